"""Recorded windows of reading, and the meta-gradients that come of them."""

import torch

from dynlm.data.segments import article_segments
from dynlm.inner import InnerLoop, ReadConfig
from dynlm.meta.recording import Recording
from dynlm.meta.sampling import sample_coordinates
from lab import START, make_article

SEGMENT = 5


def pieces_of(n_tokens):
    return list(article_segments(make_article(n_tokens, seed=3).ids_T, START, SEGMENT))


def read_window(lab, rule, n_tokens, carry=0, record=None):
    """Read ``carry`` segments, then a recorded window; returns (recording, position before it, pieces, weights)."""
    model, score, priors = lab
    pieces = pieces_of(n_tokens)
    with InnerLoop(model, score, rule, priors, ReadConfig(segment=SEGMENT, kernel="eager")) as reader:
        for piece in pieces[:carry]:
            reader.segment(*piece)
        start = reader.snapshot()
        everything = sample_coordinates([t.numel() for t in reader.thetas], 0, torch.Generator())
        recording = Recording(reader, everything, len(pieces), record)
        weights = [0.1 + 0.05 * t for t in range(len(pieces) - carry)]
        for piece, weight in zip(pieces[carry:], weights, strict=True):
            recording.add(reader.segment(*piece), reader.state.clock.step, weight)
        return recording, start, pieces[carry:], weights, reader.adapted


def gradients(rule):
    result = {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}
    rule.zero_grad(set_to_none=True)
    return result


def flat(rule):
    return torch.cat([g.flatten() for g in gradients(rule).values()])
