"""The LSTM without transformers is the one with it: same names, losses and gradients bit for bit."""

import pytest
import torch

from dynlm.data.segments import article_segments
from dynlm.files import read_tensors, write_tensors
from dynlm.inner import InnerLoop
from dynlm.models.core import LSTMScorer, is_lstm, load_lstm
from dynlm.models.lstm import ModelConfig
from dynlm.optim.handmade import RMS
from dynlm.priors import measure_priors
from dynlm.types import InputError
from lab import START, VOCAB, make_article


@pytest.fixture(params=[(1, False), (2, False), (1, True), (2, True)], ids=["1", "2", "1-projected", "2-projected"])
def saved(request, tmp_path):
    layers, projection = request.param
    config = ModelConfig(embedding_size=6, hidden_size=7, layers=layers, projection=projection)
    model = config.build(VOCAB, START, seed=1).eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_it_reads_as_the_transformers_model_does(saved):
    model, folder = saved
    assert is_lstm(folder)
    article, found = make_article(100), []
    for scored, score in ((model, LSTMScorer(model)), (plain := load_lstm(folder), LSTMScorer(plain))):
        priors = measure_priors(scored, score, article_segments(make_article(120, seed=9).ids_T, START, 8))
        with InnerLoop(scored, score, RMS(lr=1e-2), priors) as reader:
            losses_T = reader.read(article, START)
            found.append((losses_T, [p.name for p in priors], [t.clone() for t in reader.thetas]))
    (losses_T, names, thetas), (plain_T, plain_names, plain_thetas) = found
    assert names == plain_names
    assert torch.equal(losses_T, plain_T)
    assert all(map(torch.equal, thetas, plain_thetas))


def test_half_precision_files_become_float32(saved):
    _, folder = saved
    tensors, meta = read_tensors(folder / "model.safetensors")
    write_tensors(folder / "model.safetensors", {name: t.half() for name, t in tensors.items()}, meta)
    assert {p.dtype for p in load_lstm(folder).parameters()} == {torch.float32}


def test_a_broken_folder_is_one_line(saved, tmp_path):
    _, folder = saved
    assert not is_lstm(tmp_path)
    tensors, meta = read_tensors(folder / "model.safetensors")
    del tensors["lm_head.bias"]
    write_tensors(folder / "model.safetensors", tensors, meta)
    with pytest.raises(InputError, match=r"^[^\n]+not a whole model[^\n]+lm_head.bias"):
        load_lstm(folder)
