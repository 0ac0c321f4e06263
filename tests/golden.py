"""Numbers of a whole small chain and of reading with the shipped kit, to be compared with tests/golden.json.

    python tests/golden.py          # compute them and print what moved
    python tests/golden.py --write  # accept them: commit tests/golden.json with the reason why they moved

One thread, float32. On the machine and torch that wrote them they are the same to the bit; elsewhere to ``ELSEWHERE``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_suffix(".json")
ELSEWHERE = 1e-6
"""relative difference that other processors and releases of torch may make"""
WORDS = """river stone garden winter letter mountain keeper lantern harbour village teacher market window bridge orchard
    carried found wrote opened crossed built painted followed remembered sold quietly slowly again never often early
    old small bright narrow distant the a this every his her near under above beyond behind within"""
FLAGS = """--quiet --threads 1 --model.hidden-size 16 --model.projection --model.input-dropout 0.1 --train.epochs 2
    --prior.tokens 512 --tune.rules sgd rms --tune.trials 3 --tune.max-tokens 200 --meta.steps 6 --meta.lr 2e-2
    --meta.estimator.coordinates 300 --evaluate.methods static stateless sgd rms gated"""


def text(seed: int, length: int) -> str:
    """Lines of drawn words about three names that repeat; the same on every machine."""
    draw, words = random.Random(seed), WORDS.split()
    names = ["".join(draw.choice("bdklmnrstv") + draw.choice("aeiou") for _ in range(3)).capitalize() for _ in range(3)]
    lines, made = [], 0
    while made < length:
        line = [draw.choice(names if draw.random() < 0.25 else words) for _ in range(draw.randint(6, 14))]
        lines.append(" ".join(line).capitalize() + ".")
        made += len(line)
    return "\n".join(lines) + "\n"


def compute(folder: Path) -> dict[str, Any]:
    """All numbers, by name: floats that may move a little elsewhere, and hashes of what is compared to the bit."""
    import torch

    torch.set_num_threads(1)
    return {**chain(folder), **kit()}


def chain(folder: Path) -> dict[str, Any]:
    """``train``, ``tune``, ``meta-train`` and ``evaluate`` of a tiny model."""
    import torch

    from chain import run_chain
    from dynlm.files import read_tensors
    from dynlm.runs import Run

    articles = [{"title": f"Text {seed}", "text": text(seed, 140)} for seed in range(30)]
    run = Run(run_chain(folder, articles, *FLAGS.split())[1])
    last = json.loads(run.log("train").read_text().splitlines()[-1])
    numbers: dict[str, Any] = {"train.valid": last["valid"], "train.loss": last["train"]}
    numbers["model.bits"] = digest(run.model / "model.safetensors")
    for name in ("sgd", "rms", "gated"):
        tensors, _ = read_tensors(run.rule(name))
        numbers[f"rule.{name}.sum"] = sum(float(t.double().abs().sum()) for t in tensors.values())
    results = json.loads(run.results.read_text())
    losses, _ = read_tensors(run.losses)
    for name, method in results["methods"].items():
        numbers[f"evaluate.{name}.nats"] = method["nats"]
        numbers[f"evaluate.{name}.bits"] = digest(losses[f"losses/{name}"])
    numbers["evaluate.tokens"] = results["tokens"]
    assert torch.get_num_threads() == 1
    return numbers


def kit() -> dict[str, Any]:
    """``dynlm read`` with the shipped model and each of its rules."""
    from dynlm.data.tokenizers import tokenize
    from dynlm.session.reader import Reader
    from dynlm.session.session import load_session
    from dynlm.types import Article

    numbers: dict[str, Any] = {}
    for name in ("rms", "gated"):
        loaded = load_session("wikitext2", light=True)
        (article,) = tokenize(loaded.tokenizer, [Article("golden", "Golden", text(1000, 400))])
        numbers["kit.tokens"] = len(article)
        for method, reader in zip(("static", name), Reader(loaded, name).pair(), strict=True):
            with reader:
                losses_T = reader.read(article, loaded.tokenizer.start_id)
            numbers[f"kit.{method}.nats"] = float(losses_T.double().sum())
            numbers[f"kit.{method}.last"] = float(losses_T[-50:].double().sum())
            numbers[f"kit.{method}.bits"] = digest(losses_T)
    return numbers


def digest(value: Any) -> str:
    """SHA-256, shortened, of a file or a tensor."""
    data = value.read_bytes() if isinstance(value, Path) else value.contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def machine() -> str:
    """What the bits depend on: the processor with its caches, limits on what it may use, torch."""
    import torch

    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else [platform.processor()]
    processor = sorted({line for line in lines if line.startswith(("model name", "cache size", "flags"))})
    limits = [os.environ.get(name, "") for name in ("DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "DYNLM_KERNEL")]
    shown = hashlib.sha256("\n".join([*processor, *limits]).encode()).hexdigest()[:12]
    return f"{platform.machine()} {shown}, torch {torch.__version__}"


def moved(found: dict[str, Any], golden: dict[str, Any]) -> list[str]:
    """What differs by more than it may, a line each."""
    expected, same = golden["numbers"], golden["machine"] == machine()
    lines = [f"{name} is new" for name in found.keys() - expected.keys()]
    lines += [f"{name} is gone" for name in expected.keys() - found.keys()]
    for name in expected.keys() & found.keys():
        a, b = expected[name], found[name]
        exact = same or isinstance(a, int)
        if a != b if exact else isinstance(a, float) and abs(a - b) > ELSEWHERE * abs(a):
            lines.append(f"{name} was {a}, is {b}")
    return sorted(lines)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = compute(Path(folder))
    if "--write" in sys.argv:
        PATH.write_text(json.dumps({"machine": machine(), "numbers": found}, indent=1) + "\n")
        return 0
    lines = moved(found, json.loads(PATH.read_text()))
    print("\n".join(lines) or "nothing moved")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
