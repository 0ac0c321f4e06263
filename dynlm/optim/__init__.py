"""Online update rules, hand-made and learned, behind one contract."""
