"""Cutting: every token a target exactly once."""

import pytest
import torch

from dynlm.data.segments import article_segments, training_streams
from dynlm.types import InputError
from lab import make_article


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_segments_score_every_token_once_in_order(size):
    ids = torch.arange(10, 20)
    pieces = list(article_segments(ids, 5, size))
    assert torch.equal(torch.cat([targets for _, targets in pieces]), ids)
    assert torch.equal(torch.cat([inputs for inputs, _ in pieces]), torch.tensor([5, *range(10, 19)]))


def test_segment_size_has_a_lower_bound():
    with pytest.raises(InputError, match="segment size 0"):
        list(article_segments(torch.arange(3), 0, 0))


def test_streams_hold_whole_articles_in_an_order_of_the_seed():
    articles = [make_article(50, seed) for seed in range(8)]
    first, again, other = (training_streams(articles, 4, seed) for seed in (0, 0, 1))
    assert first.shape == (4, 100)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.flatten().sort().values, torch.cat([a.ids_T for a in articles]).sort().values)


def test_too_little_text_for_the_streams():
    with pytest.raises(InputError, match="5 training tokens cannot fill 4 streams"):
        training_streams([make_article(5)], 4, 0)
