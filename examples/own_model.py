"""Let any causal language model of transformers learn while it reads, and say with intervals what that gains.

    python examples/own_model.py gpt2 "articles/*.txt" --params "*.mlp.c_proj.weight" --run runs/gpt2

Without a model it is the one that ships, without articles the documentation that Python carries.
"""

import argparse

import dynlm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="wikitext2", help="folder or hub name (%(default)s)")
    parser.add_argument("data", nargs="?", default="stdlib", help=".txt, .jsonl or .parquet files, or a glob of them")
    parser.add_argument("--params", nargs="+", help="globs of the weights that learn; without any, all do")
    parser.add_argument("--articles", type=int, default=8, help="to tune on, and again to evaluate on (%(default)s)")
    parser.add_argument("--trials", type=int, default=10, help="settings that are tried (%(default)s)")
    parser.add_argument("--run", default="runs/own-model", help="folder of the results and the report (%(default)s)")
    args = parser.parse_args()

    corpus = dynlm.load_corpus(args.data, meta_articles=args.articles, held_out=args.articles)
    settings = {"params": tuple(args.params)} if args.params else {}
    reader = dynlm.Reader.from_pretrained(args.model, rule="rms", **settings)
    rms = dynlm.tune(reader, corpus.meta, "rms", trials=args.trials, max_tokens=1024)
    print("tuned rms:", ", ".join(f"{name} {value:.3g}" for name, value in rms.settings().items()))

    results = dynlm.evaluate(reader, corpus.valid, ["static", rms])  # articles that tuning has not seen
    print(results.table())
    print("report:", results.report(args.run))


if __name__ == "__main__":
    main()
