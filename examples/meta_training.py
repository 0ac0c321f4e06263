"""Meta-train a gated rule for your kind of text: it begins at tuned RMS dynamic evaluation, and moves where that pays.

    python examples/meta_training.py "articles/*.txt" --steps 100 --folder runs/my-rule

Without articles it reads the documentation that Python carries.
"""

import argparse

import dynlm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="stdlib", help="files or a glob of them (%(default)s)")
    parser.add_argument("--model", default="wikitext2", help="that ships, a run, a folder or a hub name (%(default)s)")
    parser.add_argument("--articles", type=int, default=24, help="to train on, and at most to test on (%(default)s)")
    parser.add_argument("--trials", type=int, default=10, help="settings of RMS that are tried (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="updates of the learned rule (%(default)s)")
    parser.add_argument("--truncation", type=int, default=32, help="segments that one update sees (%(default)s)")
    parser.add_argument("--folder", default="runs/meta-training", help="log, checkpoint and rule (%(default)s)")
    args = parser.parse_args()

    corpus = dynlm.load_corpus(args.data, meta_articles=args.articles, held_out=args.articles)
    reader = dynlm.Reader.from_pretrained(args.model, rule="rms")
    rms = dynlm.tune(reader, corpus.meta, "rms", trials=args.trials, max_tokens=1024)
    settings = {"steps": args.steps, "truncation": args.truncation, "validate_every": max(1, args.steps // 6)}
    gated = dynlm.meta_train(reader, corpus.meta, rms, args.folder, **settings)

    print(dynlm.evaluate(reader, corpus.valid, ["static", rms, gated]).table())
    print("rule:", dynlm.optim.save_pretrained(gated, f"{args.folder}/shared"))


if __name__ == "__main__":
    main()
