"""The command line: the only place where data, models, rules, training and evaluation are put together."""
