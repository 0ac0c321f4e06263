"""Sizes and special tokens of the LSTM as transformers keeps them, and how it finds the model of a saved folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from dynlm.files import write_text

CODE = "dynlm_lstm.py"  # beside a saved model
IMPORT = '''"""Where transformers finds the model of this folder, with trust_remote_code=True: all of it is in dynlm."""

from dynlm.models.lstm import LSTMConfig as LSTMConfig
'''


class LSTMConfig(PreTrainedConfig):
    """Sizes and regularisers. Dropouts are probabilities, active in training only."""

    model_type = "dynlm_lstm"
    keys_to_ignore_at_inference = ["hidden", "penalty"]

    vocab_size: int = 4096
    embedding_size: int = 256
    hidden_size: int = 256
    num_hidden_layers: int = 1
    projection: bool = False
    embedding_dropout: float = 0.0
    input_dropout: float = 0.0
    hidden_dropout: float = 0.0
    output_dropout: float = 0.0
    weight_drop: float = 0.0
    activation_regularization: float = 0.0
    temporal_activation_regularization: float = 0.0
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """Write config.json, and beside it a file that imports dynlm."""
        self.auto_map = {"AutoConfig": f"{CODE.removesuffix('.py')}.{type(self).__name__}"}
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CODE, IMPORT)
        super().save_pretrained(folder, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: what is loaded by way of that file must not be saved as a copy of this one."""
