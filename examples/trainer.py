"""Train a small GPT-2 with the Trainer of transformers and the learned optimizer; "adamw" trains it with AdamW.

    python examples/trainer.py "articles/*.txt" --optimizer learned --steps 300

The model reads bytes, so that it needs no tokenizer; yours goes in its place.
"""

import argparse
import math

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import dynlm

OPTIMIZERS = {"learned": dynlm.LearnedOptimizer, "adamw": torch.optim.AdamW}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data", nargs="?", default="stdlib", help="files or a glob of them (%(default)s)")
parser.add_argument("--optimizer", choices=OPTIMIZERS, default="learned", help="%(default)s")
parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate, in AdamW's units (%(default)s)")
parser.add_argument("--steps", type=int, default=300, help="%(default)s")
args = parser.parse_args()


def blocks(articles, length=128):
    ids = torch.tensor(list("".join(article.text for article in articles).encode()))
    return [{"input_ids": block, "labels": block} for block in ids.split(length) if len(block) == length]


corpus = dynlm.load_corpus(args.data)
set_seed(0)
size = {"vocab_size": 256, "n_positions": 128, "n_embd": 128, "n_layer": 3, "n_head": 4}
model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
settings = {"max_steps": args.steps, "learning_rate": args.lr, "weight_decay": 0.01, "save_strategy": "no"}
settings |= {"per_device_train_batch_size": 16, "dataloader_pin_memory": torch.cuda.is_available()}
data = {"train_dataset": blocks(corpus.train), "eval_dataset": blocks(corpus.valid)}
optimizer = OPTIMIZERS[args.optimizer], {"lr": args.lr}
trainer = Trainer(model, TrainingArguments("runs/trainer", **settings), **data, optimizer_cls_and_kwargs=optimizer)
trainer.train()
print(f"{args.optimizer}: {trainer.evaluate()['eval_loss'] / math.log(2):.3f} bits per byte of held-out text")
