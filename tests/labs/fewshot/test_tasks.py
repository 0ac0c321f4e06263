"""Few-shot tasks and the characters they are made of."""

import math

import pytest
import torch
from PIL import Image

from dynlm.labs.fewshot.characters import font_characters, hub_characters
from dynlm.labs.fewshot.tasks import Images, Sinusoids, TasksConfig, divide, load_tasks
from dynlm.types import InputError

SIDE = 12


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def characters():
    return font_characters(SIDE, 1, 0)


def test_sinusoids_are_sines_in_the_papers_ranges():
    source, random = Sinusoids(10, 40), generator()
    for _ in range(20):
        (x, y), (x2, y2) = source.sample(random)
        assert x.shape == y.shape == (10, 1)
        assert x2.shape == y2.shape == (40, 1)
        points, values = torch.cat([x, x2]).double(), torch.cat([y, y2]).double()
        assert points.abs().max() <= 5
        basis = torch.cat([points.sin(), points.cos()], 1)  # A sin(x + φ) = A cos φ · sin x + A sin φ · cos x
        a, b = torch.linalg.lstsq(basis, values).solution[:, 0].tolist()
        assert (basis @ torch.tensor([[a], [b]], dtype=torch.float64) - values).abs().max() < 1e-5
        assert 0.1 <= math.hypot(a, b) <= 5
        assert -1e-6 <= math.atan2(b, a) <= math.pi + 1e-6


@pytest.mark.parametrize("source", [Sinusoids(3, 4), Images([torch.rand(8, 4, 4) for _ in range(9)], 5, 1, 2)])
def test_the_generator_alone_decides_the_task(source):
    first, again, other = (source.sample(generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(first.support[0], other.support[0])


def test_minibatches_draw_from_support_and_query():
    task = Sinusoids(3, 5).sample(generator())
    known = {tuple(pair) for piece in task for pair in torch.cat(piece, 1).tolist()}
    batches = task.minibatches(20, 4, generator())
    seen = [tuple(pair) for piece in batches for pair in torch.cat(piece, 1).tolist()]
    assert set(seen) == known
    assert all(len(torch.cat(piece, 1).unique(dim=0)) == 4 for piece in batches)


def test_image_tasks_have_distinct_instances_of_distinct_classes():
    images = [torch.full((6, 2, 2), 10.0 * c) + torch.arange(6.0)[:, None, None] for c in range(8)]
    source, random, seen = Images(images, ways=5, shots=2, queries=3), generator(), set()
    for _ in range(30):
        (x, y), (x2, y2) = source.sample(random)
        assert x.shape == (10, 1, 2, 2)
        assert x2.shape == (15, 1, 2, 2)
        codes, codes2 = x[:, 0, 0, 0], x2[:, 0, 0, 0]
        assert len(set(codes.tolist()) | set(codes2.tolist())) == 25, "support and query share an instance"
        classes = {int(label): int(code) // 10 for label, code in zip(y, codes, strict=True)}
        assert len(set(classes.values())) == 5
        assert all(classes[int(label)] == int(code) // 10 for label, code in zip(y2, codes2, strict=True))
        seen.add(tuple(classes.values()))
    assert len(seen) > 25, "classes and their labels must change from task to task"


@pytest.mark.parametrize(
    ("ways", "queries", "part"), [(9, 1, "8 classes for 9-way"), (5, 6, "6 instances, fewer than")]
)
def test_too_few_images_is_one_line(ways, queries, part):
    with pytest.raises(InputError, match=part):
        Images([torch.zeros(6, 2, 2)] * 8, ways, 1, queries)


def test_characters_are_ink_on_black_and_many(characters):
    assert len(characters) > 400
    for instances in characters.values():
        assert instances.shape[0] >= 12
        assert instances.shape[1:] == (SIDE, SIDE)
        assert instances.min() >= 0
        assert instances.max() <= 1
        assert (instances.amax((1, 2)) > 0.25).all(), "a blank image"
        assert instances[:, 0].mean() < 0.3, "the border is black"


@pytest.mark.parametrize("likes", ["AΑА", "ΒВB", "oοоO", "HΗН", "XΧХ", "−–"])
def test_characters_that_look_alike_are_one_class(characters, likes):
    assert sum(character in characters for character in likes) <= 1


def test_classes_are_apart(characters):
    """The mean images of any two characters differ, those of an accent-free alphabet are all there."""
    means = torch.stack([c.mean(0).flatten() for c in characters.values()])
    likeness = torch.nn.functional.normalize(means) @ torch.nn.functional.normalize(means).t()
    assert (likeness - torch.eye(len(means))).max() < 0.995
    assert sum(character in characters for character in "ABCDEFGHIJKLMNOPQRSTUVWXYZ") > 15
    assert not any(character in characters for character in "éÄﬁ ─⠿")


def test_characters_are_decided_by_the_seed(characters):
    again = font_characters.__wrapped__(SIDE, 1, 0)
    other = font_characters(SIDE, 1, 1)
    assert list(again) == list(characters) == list(other)
    assert all(torch.equal(again[c], characters[c]) for c in characters)
    assert not torch.equal(other["A"], characters["A"])
    assert font_characters(SIDE, 2, 0)["A"].shape[0] == 2 * characters["A"].shape[0]


def test_divided_classes_are_disjoint_and_complete():
    names = [str(i) for i in range(446)]
    parts = divide(names, 0)
    assert [len(part) for part in parts] == [268, 66, 112]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert divide(names, 0) == parts != divide(names, 1)


def test_test_characters_are_never_trained_on():
    config = TasksConfig(kind="characters", side=SIDE, variants=1, shots=1, queries=3)
    splits = load_tasks(config)
    pictures = [{image.numpy().tobytes() for c in source.images for image in c} for source in splits]
    assert not pictures[0] & pictures[1]
    assert not pictures[0] & pictures[2]
    assert not pictures[1] & pictures[2]


def hub(classes, instances, columns=("image", "label")):
    """What datasets.load_dataset gives: splits of rows with PIL images, black ink on white."""
    import datasets

    def row(label, i):
        picture = Image.new("L", (30, 30), 255)
        picture.putpixel((3 * label, i), 0)
        return picture.resize((30, 30))

    rows = [(row(c, i), c) for c in range(classes) for i in range(instances)]
    return {"train": datasets.Dataset.from_dict(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)))}


def test_hub_images_are_grouped_by_label_and_inverted(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub(8, 4))
    found = hub_characters("some/omniglot", 15)
    assert sorted(found) == [str(c) for c in range(8)]
    assert all(c.shape == (4, 15, 15) for c in found.values())
    assert all(c.mean() < 0.1 < c.max() for c in found.values())


def test_hub_characters_that_cannot_be_had_are_one_line(monkeypatch):
    import datasets

    def offline(name):
        raise ConnectionError(f"Couldn't reach {name}\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"neither cached nor reachable \(Couldn't reach some/omniglot\)") as error:
        load_tasks(TasksConfig(kind="characters", source="hf:some/omniglot"))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub(2, 1, ("image", "other")))
    with pytest.raises(InputError, match="not image and label"):
        hub_characters("some/omniglot", 15)
    with pytest.raises(InputError, match="choose fonts or hf:NAME"):
        load_tasks(TasksConfig(kind="characters", source="omniglot"))
