"""Where transformers finds the model of this folder, with trust_remote_code=True: all of it is in dynlm."""

from dynlm.models.lstm import LSTMConfig as LSTMConfig
