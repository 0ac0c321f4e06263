"""Several processes of one command: how work is divided, that no bit depends on it, and who writes."""

import os
from fractions import Fraction

import pytest
import torch

from dynlm.changes import changing
from dynlm.evaluation.stream import read_and_watch
from dynlm.inner import InnerLoop, ReadConfig
from dynlm.optim.handmade import RMS, SGD
from dynlm.processes import LostProcess, exchanged, is_main, largest, once, rank, require_alike, shares, spread
from dynlm.types import DivergedError, InputError
from lab import START, make_article, make_lab
from support.together import together

ARTICLES = [make_article(length, seed, f"a{seed}") for seed, length in enumerate((90, 20, 41, 64, 17))]


def test_the_longest_goes_first_to_whom_has_the_least():
    assert shares([5, 1, 1, 3, 4], 2) == [[0, 1, 2], [3, 4]]
    assert shares([2, 2, 2, 2, 2], 2) == [[0, 2, 4], [1, 3]]  # equal costs: in turns
    assert shares([7], 3) == [[0], [], []]
    generator = torch.Generator().manual_seed(0)
    costs = [Fraction(int(cost)) for cost in torch.randint(1, 1000, (60,), generator=generator)]
    divided = shares(costs, 7)
    assert sorted(i for share in divided for i in share) == list(range(60))
    longest = max(sum(costs[i] for i in share) for share in divided)
    assert longest <= Fraction(4, 3) * max(sum(costs) / 7, max(costs))


def test_results_come_in_order_to_everyone():
    def work():
        found = spread(lambda i: (i, rank()), [3.0, 1.0, 2.0])
        alone = spread(lambda i: rank(), [1.0, 1.0], divided=False)
        return found, alone, largest(10 + rank())

    assert together(work) == [([(0, 0), (1, 1), (2, 1)], [0, 0], 11)] * 2


def test_the_first_divergence_is_raised_everywhere():
    def work():
        def diverge(i):
            if i:
                raise DivergedError(f"item {i}")
            return i

        spread(diverge, [1.0] * 5)

    assert [(type(error), str(error)) for error in together(work)] == [(DivergedError, "item 1")] * 2


def test_different_settings_are_refused():
    def work():
        require_alike("same", "recipe")
        require_alike(rank(), "recipe")

    for error in together(work):
        assert isinstance(error, InputError)
        assert "process 1 of 2 was started with another recipe" in str(error)


def test_who_is_lost_ends_the_others():
    def work():
        if not is_main():
            raise KeyError("a bug")
        return exchanged(0)

    main, other = together(work)
    assert isinstance(main, LostProcess)
    assert isinstance(other, KeyError)


def test_only_the_main_process_writes_and_the_others_see_it(tmp_path):
    path = tmp_path / "file"

    def work():
        with changing(tmp_path) as new:
            new.at(path).write_text(str(rank()))
        seen = [path.read_text()]
        once(lambda: path.write_text(f"{os.getpid()} alone"))
        return [*seen, path.read_text()]

    main, other = together(work)
    assert main == other
    assert main[0] == "0"
    assert main[1].endswith("alone")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("reset", ["article", "never"])
def test_evaluation_is_that_of_one_process_bit_for_bit(reset):
    def work():
        model, score, priors = make_lab(torch.float32)
        reader = InnerLoop(model, score, RMS(lr=1e-2), priors, ReadConfig(segment=8, reset=reset))
        return read_and_watch(reader, ARTICLES, START, gate_articles=2)

    alone, (first, second) = work(), together(work)
    for found in (first, second):
        assert all(map(torch.equal, found.losses, alone.losses))
        assert len(found.losses) == len(ARTICLES)
        assert found.calibration == alone.calibration
        assert torch.equal(found.gates.values_3Un, alone.gates.values_3Un)
        assert found.gates.segments == alone.gates.segments
        assert (found.again is None) == (reset == "article")
        assert found.again is None or torch.equal(found.again, alone.again)
    assert first.seconds == second.seconds


def test_who_diverges_is_told_as_by_one_process():
    def work():
        model, score, priors = make_lab(torch.float32)

        def broken(inputs_S, targets_S, hidden):
            losses_S, hidden = score(inputs_S, targets_S, hidden)
            return losses_S * (torch.nan if len(targets_S) in (1, 4) else 1.0), hidden  # ends of articles 1, 2 and 4

        reader = InnerLoop(model, broken, SGD(0.1), priors, ReadConfig(segment=8))
        with pytest.raises(DivergedError) as caught:
            read_and_watch(reader, ARTICLES, START)
        return str(caught.value)

    alone = work()
    assert "article 1 ('a1'): the loss is nan at segment 2" in alone
    assert together(work) == [alone] * 2
