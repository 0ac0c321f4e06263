"""Exercises: shapes, determinism, what is held out, and that each asks what it says."""

import pytest
import torch

from dynlm.labs.general import exercises
from dynlm.labs.general.exercises import GlyphNoise, Spectrum, generator_of
from dynlm.types import InputError


@pytest.fixture(params=["glyphs", "pixels", "text", "copy", "add", "teacher", "sinusoids", "linear", "classes"])
def exercise(request):
    """A draw, the shape and type of an example's input and target."""
    real, number = torch.float32, torch.int64
    return {
        "glyphs": lambda: (exercises.glyph_classes("017", 8, GlyphNoise()), (1, 8, 8), real, (), number),
        "pixels": lambda: (exercises.glyph_classes("017", 8, GlyphNoise(), True), (1, 8, 8), real, (64,), real),
        "text": lambda: (exercises.text_windows(exercises.documentation(), 9), (9,), number, (9,), number),
        "copy": lambda: (exercises.transductions("copy", 5, 4), (8,), number, (4,), number),
        "add": lambda: (exercises.transductions("add", 5, 4), (12,), number, (4,), number),
        "teacher": lambda: (exercises.teacher([3, 8, 2], 0.1, generator_of(0)), (3,), real, (2,), real),
        "sinusoids": lambda: (exercises.sinusoids(3, 2, 0.1, generator_of(0)), (2,), real, (1,), real),
        "linear": lambda: (exercises.linear(Spectrum(6, 10), 1, 0.1, generator_of(0)), (6,), real, (1,), real),
        "classes": lambda: (exercises.linear(Spectrum(6, 10), 3, 0.1, generator_of(0)), (6,), real, (), number),
    }[request.param]()


def test_draws_have_their_shapes_and_depend_on_the_generator_alone(exercise):
    draw, *expected = exercise
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for held_out in (False, True):
        first, again, other = (draw(7, generator_of(seed), held_out) for seed in (1, 1, 2))
        assert [*(x for tensor in first for x in (tuple(tensor.shape[1:]), tensor.dtype))] == expected
        assert all(len(tensor) == 7 and tensor.is_contiguous() for tensor in first)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_in_combination_are_seeds_of_their_own():
    draws = {torch.rand(1, generator=generator_of(*seeds)).item() for seeds in ((0,), (1,), (0, 1), (1, 0), (0, 0))}
    assert len(draws) == 5


def test_glyphs_are_every_symbol_and_held_out_ones_are_others():
    images = exercises.glyph_images("08", 8)
    assert all(len(instances) == 16 * 12 for instances in images), "16 fonts, 12 variants"
    assert all(instances.min() >= 0 and instances.max() <= 1 for instances in images)
    draw = exercises.glyph_classes("08", 8, GlyphNoise(pixels=0))
    train, valid = (draw(2000, generator_of(0), held_out) for held_out in (False, True))
    assert abs(train[0].mean()) < 0.5
    assert set(train[1].tolist()) == {0, 1}
    seen = {tuple(image.flatten().tolist()) for image in train[0]}
    assert not any(tuple(image.flatten().tolist()) in seen for image in valid[0])


def test_label_noise_is_a_share_of_training_labels_and_none_of_held_out_ones():
    clean, noisy = (exercises.glyph_classes("0123456789", 8, GlyphNoise(0.1, share)) for share in (0, 0.5))
    for held_out, expected in ((False, 0.45), (True, 0.0)):  # one label in ten is drawn right again
        pieces = [draw(4000, generator_of(0), held_out) for draw in (clean, noisy)]
        assert torch.equal(pieces[0][0], pieces[1][0])
        assert (pieces[0][1] != pieces[1][1]).float().mean().item() == pytest.approx(expected, abs=0.04)


def test_text_predicts_the_next_token_and_holds_documents_out():
    corpus = exercises.documentation()
    assert corpus.vocabulary == 64
    assert corpus.train_T.max() == 63
    assert len(corpus.train_T) > 5 * len(corpus.valid_T) > 50_000
    inputs, targets = exercises.text_windows(corpus, 9)(5, generator_of(0), False)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    windows = corpus.valid_T.unfold(0, 60, 2000)
    train = "".join(map(chr, corpus.train_T.tolist()))
    assert not any("".join(map(chr, window.tolist())) in train for window in windows)


def test_held_out_corpora_are_python_source_and_words():
    source, words = exercises.source_code(), exercises.docstrings()
    for corpus, vocabulary in ((source, 96), (words, 512)):
        assert corpus.vocabulary == vocabulary
        assert corpus.train_T.max() == vocabulary - 1, "all symbols are used"
        assert len(corpus.train_T) > 100_000
        assert len(corpus.valid_T) > 10_000
        assert (corpus.train_T == 0).float().mean() < 0.01


def test_no_sources_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(exercises.sysconfig, "get_path", lambda name: str(tmp_path))
    for corpus in (exercises.source_code, exercises.documentation):
        with pytest.raises(InputError, match="this Python ships without"):
            corpus.__wrapped__()


def test_transductions_show_the_source_then_its_image():
    for kind, image in (("reverse", lambda x: x.flip(1)), ("sort", lambda x: x.sort(1).values)):
        inputs, targets = exercises.transductions(kind, 5, 4)(6, generator_of(0), False)
        assert torch.equal(targets, image(inputs[:, :4]))
        assert (inputs[:, 4] == 5).all()
        assert torch.equal(inputs[:, 5:], targets[:, :-1])
    inputs, targets = exercises.transductions("add", 5, 3)(6, generator_of(0), False)
    assert torch.equal(targets, (inputs[:, :3] + inputs[:, 3:6]) % 5)


def test_functions_have_about_unit_variance_and_noise_only_in_training():
    for make in (
        lambda noise: exercises.teacher([3, 8, 2], noise, generator_of(0)),
        lambda noise: exercises.sinusoids(3, 1, noise, generator_of(0)),
        lambda noise: exercises.linear(Spectrum(20, 10), 1, noise, generator_of(0)),
    ):
        clean, noisy = make(0.0), make(0.5)
        for held_out, expected in ((False, 0.5), (True, 0.0)):
            (_, y), (_, z) = (draw(3000, generator_of(1), held_out) for draw in (clean, noisy))
            assert 0.4 < y.std() < 2
            assert (z - y).std().item() == pytest.approx(expected, rel=0.1)


def test_spectrum_is_as_ill_conditioned_as_asked():
    x = exercises.linear(Spectrum(5, 100), 1, 0.0, generator_of(0))(20_000, generator_of(1), False)[0]
    singular = torch.linalg.svdvals(x)
    assert (singular[0] / singular[-1]).item() == pytest.approx(100, rel=0.05)
