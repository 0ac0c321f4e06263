"""Texts of different length in one batch: a padded place changes no state, and no score of another place.

An attention mask (B, T) is 1 where a row has a token and 0 where it is padded, on the left, on the right, or in
between. ``torch.lstm`` reads packed rows, which begin with their tokens; results go back to their places.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from dynlm.types import InputError

State = tuple[Tensor, Tensor]


class Padding:
    """The padded places of a batch."""

    def __init__(self, mask_BT: Tensor) -> None:
        self.real_BT = mask_BT != 0
        self.lengths_B = self.real_BT.sum(1)
        if not self.lengths_B.all():
            row = int(self.lengths_B.argmin())
            raise InputError(f"row {row} of attention_mask has no token: leave the row out")
        self.tokens_first_BT = self.real_BT.to(torch.uint8).argsort(dim=1, descending=True, stable=True)

    def lstm(
        self, x_BTD: Tensor, state: State, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor
    ) -> tuple[Tensor, State]:
        """As :func:`dynlm.models.recurrence.lstm_layer`. A padded place repeats the output of the token before it (zero
        before the first), as the state does not change there; the state is the one after each row's last token."""
        packed = self._pack(x_BTD)
        assert packed.sorted_indices is not None  # None where enforce_sorted is True
        assert packed.unsorted_indices is not None
        h, c = (s.index_select(0, packed.sorted_indices)[None] for s in state)
        weights = [weight_ih, weight_hh, bias, torch.zeros_like(bias)]
        output, h, c = torch.lstm(packed.data, packed.batch_sizes, [h, c], weights, True, 1, 0.0, True, False)
        h, c = (s[0].index_select(0, packed.unsorted_indices) for s in (h, c))
        return self._unpack(packed._replace(data=output)), (h, c)

    def mean(self, x_BTD: Tensor) -> Tensor:
        """Over the places that hold tokens."""
        return x_BTD[self.real_BT].mean()

    def mean_change(self, x_BTD: Tensor) -> Tensor:
        """Return the mean squared change from one token to the next, zero where no row has two tokens side by side."""
        pairs = self.real_BT[:, 1:] & self.real_BT[:, :-1]
        return x_BTD.diff(dim=1)[pairs].square().sum() / max(1, int(pairs.sum()) * x_BTD.shape[2])

    def _pack(self, x_BTD: Tensor) -> PackedSequence:
        front_BTD = _at(x_BTD, self.tokens_first_BT)
        return pack_padded_sequence(front_BTD, self.lengths_B.cpu(), batch_first=True, enforce_sorted=False)

    def _unpack(self, packed: PackedSequence) -> Tensor:
        front_BTD, _ = pad_packed_sequence(packed, batch_first=True, total_length=self.real_BT.shape[1])
        seen_BT = self.real_BT.cumsum(1)
        return _at(front_BTD, (seen_BT - 1).clamp(min=0)) * (seen_BT > 0)[..., None]


def _at(x_BTD: Tensor, places_BT: Tensor) -> Tensor:
    return x_BTD.gather(1, places_BT[..., None].expand(-1, -1, x_BTD.shape[2]))


def padding_of(mask_BT: Tensor | None, batch: int, length: int) -> Padding | None:
    """Return what an attention mask says of the last ``length`` tokens; None where nothing is padded.

    Raises:
        InputError: a mask of another shape, or a row without a token.
    """
    if mask_BT is None:
        return None
    if mask_BT.dim() != 2 or mask_BT.shape[0] != batch or mask_BT.shape[1] < length:
        shape = tuple(mask_BT.shape)
        raise InputError(f"attention_mask has shape {shape}: expected ({batch}, {length}), 1 for tokens, 0 for padding")
    mask_BT = mask_BT[:, mask_BT.shape[1] - length :]
    return None if bool(mask_BT.all()) else Padding(mask_BT)
