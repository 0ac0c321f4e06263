"""Write an update rule of your own in one class, tune it, and compare it with RMS dynamic evaluation."""

import argparse

import dynlm
from dynlm.optim import Range, columns, register, scalar


class Momentum(dynlm.Rule):
    """Steps along a running mean of the gradient's direction, and decays to the trained weights."""

    name = "momentum"
    n_slots = 1  # numbers that are kept for each weight
    context_shapes = ((), (), ())  # three numbers for each tensor

    def __init__(self, lr: float = 1e-4, decay: float = 1e-3, keep: float = 0.5) -> None:
        super().__init__()
        self.lr, self.decay, self.keep = scalar(lr), scalar(decay), scalar(keep)

    def context(self, shared):
        return columns(shared, self.lr, self.decay, self.keep)

    def step(self, w, slots, context):  # of one weight: + - * /, abs, sqrt, square and clamp, which C can be made of
        lr, decay, keep = context
        mean = keep * slots[0] + (1 - keep) * w.grad / (w.rms + w.grad.abs() + 1e-6)
        return w.theta - lr * mean + decay * (w.theta0 - w.theta), (mean,)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("data", nargs="?", default="stdlib", help="files or a glob of them (%(default)s)")
parser.add_argument("--articles", type=int, default=8, help="to tune on, and again to evaluate on (%(default)s)")
parser.add_argument("--trials", type=int, default=10, help="settings that are tried of each rule (%(default)s)")
args = parser.parse_args()
register(Momentum, {"lr": Range(8e-3, 8e1, 1.6, "direction"), "decay": Range(1e-6, 3e-1, 1e-3)})  # what tuning searches
corpus = dynlm.load_corpus(args.data, meta_articles=args.articles, held_out=args.articles)
reader = dynlm.Reader.from_pretrained("wikitext2")
tuned = [dynlm.tune(reader, corpus.meta, name, trials=args.trials, max_tokens=1024) for name in ("rms", "momentum")]
print(dynlm.evaluate(reader, corpus.valid, ["static", *tuned]).table())
