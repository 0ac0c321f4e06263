"""Models of which not everything can be adapted: frozen parts are left out, quantised layers are refused."""

import pytest
import torch

from dynlm.models.causal import scorer_for
from dynlm.optim.handmade import SGD
from dynlm.types import InputError
from lab import make_article
from support.causal import make_model, make_scorer, pieces_of, priors_for, reader_for


@pytest.mark.filterwarnings("ignore:.*quantization:DeprecationWarning", "ignore:.*quantiz:UserWarning")
@pytest.mark.parametrize("name", ["llama", "lstm"])
def test_quantised_layers_are_one_clear_line(name):
    small = torch.ao.quantization.quantize_dynamic(make_model(name), {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(InputError, match=r"has quantised layers, such as '.*': quantised weights cannot be adapted"):
        scorer_for(small)


@pytest.mark.parametrize("name", ["lstm", "gpt2", "llama"])
def test_frozen_parts_are_left_out_and_said_so(name):
    score = make_scorer(name)
    first = next(iter(score.model.named_parameters()))
    first[1].requires_grad_(False)
    with pytest.warns(UserWarning, match=rf"1 frozen parameters are not adapted, such as '{first[0]}'"):
        priors = priors_for(score)
    assert len(priors) == len(list(score.model.parameters())) - 1
    before = first[1].clone()
    with reader_for(score, SGD(0.1), priors) as reader:
        static = score(*pieces_of(make_article(16))[1], None)[0].mean()
        for piece in pieces_of(make_article(16)):
            reader.segment(*piece)
        assert score(*pieces_of(make_article(16))[1], None)[0].mean() < static
        assert torch.equal(first[1], before)
    score.model.requires_grad_(False)
    with pytest.raises(InputError, match=r"that match \* are frozen .*: unfreeze some"):
        priors_for(score)
