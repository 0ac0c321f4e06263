"""Read your own text with the model that ships, and see where learning while reading gains.

    python examples/own_text.py my-article.txt --html my-article.html

Without a text it reads the article that lies beside this file.
"""

import argparse
from pathlib import Path

import dynlm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    article = Path(__file__).with_name("vaskerholt.txt")
    parser.add_argument("texts", nargs="*", type=Path, default=[article], help=".txt, .md, .html or .jsonl files")
    parser.add_argument("--html", type=Path, default=Path("page.html"), help="page to write (%(default)s)")
    args = parser.parse_args()

    reader = dynlm.Reader.from_pretrained()
    reading = reader.read(*args.texts)  # each token is scored before any update that sees it
    print(f"{len(reading):,} tokens, gain {reading.gain:+.3f} nats per token over the same model without learning")
    print(f"bits per byte: {reading.static_bits_per_byte:.3f} without learning, {reading.bits_per_byte:.3f} with it")
    if reading.note:  # what makes these figures mislead, if anything does
        print(reading.note)

    print("\nwords that came again: loss in nats without → with learning, at the first three occurrences")
    for word in reading.to_dict()["words"][:8]:
        pairs = zip(word["static"], word["adapted"], strict=True)
        print(f"{word['word']:>16}", *(f"{static:5.1f} → {adapted:4.1f}" for static, adapted in pairs), sep="   ")

    reading.to_html(args.html)
    print(f"\nevery token, coloured by its gain: {args.html}")


if __name__ == "__main__":
    main()
