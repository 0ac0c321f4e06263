"""Reading that carries nothing: each segment as if it were the first."""

import pytest
import torch

from dynlm.evaluation.audit import audit, excerpt
from dynlm.evaluation.cache import CacheConfig, CachedReader
from dynlm.evaluation.stateless import StatelessScorer
from dynlm.evaluation.stream import read_and_watch, read_articles
from dynlm.inner import InnerLoop, ReadConfig
from dynlm.models.causal import CausalScorer
from dynlm.models.context import ContextConfig
from dynlm.optim.handmade import Static
from lab import START, VOCAB, make_article, make_lab, make_transformer_lab


def lstm():
    return make_lab(torch.float32)


def transformer(carry="overlap"):
    model, _, priors = make_transformer_lab(torch.float32)
    return model, CausalScorer(model, ContextConfig(carry)), priors


def stateless(lab, kind=InnerLoop, **config):
    return kind(lab[0], StatelessScorer(lab[1]), Static(), lab[2], ReadConfig(segment=8, **config))


@pytest.mark.parametrize("make", [lstm, transformer, lambda: transformer("cache")])
def test_each_segment_is_scored_from_an_empty_state(make):
    lab, article = make(), make_article(43)
    (losses_T,) = read_articles(stateless(lab), [article], START).losses
    (carried_T,) = read_articles(InnerLoop(*lab[:2], Static(), lab[2], ReadConfig(segment=8)), [article], START).losses
    assert torch.equal(losses_T[:8], carried_T[:8])
    assert not torch.equal(losses_T[8:16], carried_T[8:16])
    with torch.no_grad():
        alone_S, _ = lab[1](article.ids_T[15:23], article.ids_T[16:24], None)
    assert torch.equal(losses_T[16:24], alone_S)


@pytest.mark.parametrize("reset", ["article", "never"])
@pytest.mark.parametrize("make", [lstm, transformer])
def test_it_passes_the_audit_also_with_a_cache(make, reset):
    lab = make()
    first, later = (excerpt(make_article(100, seed, id), 8) for seed, id in ((1, "A"), (2, "B")))
    for make_reader in (
        lambda: stateless(lab, reset=reset),
        lambda: CachedReader.beside(stateless(lab, reset=reset), CacheConfig(0.3, 1.0, 13)),
    ):
        assert [v for v in audit(make_reader, first, later, START, VOCAB) if not v.passed] == []


def test_an_observed_reader_stays_stateless_and_reads_nothing_again():
    lab, articles = lstm(), [make_article(43, seed) for seed in (1, 2)]
    plain = read_articles(stateless(lab, reset="never"), articles, START)
    watched = read_and_watch(stateless(lab, reset="never"), articles, START, gate_articles=2)
    assert all(torch.equal(a, b) for a, b in zip(plain.losses, watched.losses, strict=True))
    assert watched.again is None
    assert watched.gates is None
    assert watched.calibration is not None
