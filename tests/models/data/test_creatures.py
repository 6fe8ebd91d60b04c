"""The demo creatures: classes that recombine, pictures that depend on their seed alone, data as the script makes it."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from models.data.creature_shapes import ACCENTS, BODIES, COLOURS, TEXTURES
from models.data.creatures import ATTRIBUTE_NAMES, SEEN, UNSEEN, Creature, attribute_table, draw_creature
from models.errors import InvalidInput

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT / "examples" / "creatures"
CLASSES = (*SEEN, *UNSEEN)
RED_BALL = Creature("plain", "red", "white", "round", ("horns", "tail"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_creatures", ROOT / "examples" / "make_creatures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float64)


# ---------------------------------------------------------------- the classes


def test_every_property_of_an_unseen_class_is_in_four_seen_ones() -> None:
    seen = Counter(name for creature in SEEN for name in creature.properties)
    assert min(seen[name] for name in ATTRIBUTE_NAMES) >= 4


def test_every_attribute_is_in_an_unseen_class() -> None:
    assert {name for creature in UNSEEN for name in creature.properties} == set(ATTRIBUTE_NAMES)


def test_no_two_names_share_more_than_three_of_their_five_properties() -> None:
    named = {creature.name: set(creature.properties) - set(ACCENTS) for creature in CLASSES}
    assert all(len(properties) == 5 for properties in named.values())
    assert max(len(named[a] & named[b]) for a, b in combinations(named, 2)) <= 3


def test_no_two_attributes_go_together_in_the_seen_classes() -> None:
    correlation = np.asarray(np.corrcoef(attribute_table(SEEN).T))
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 0.6


def test_attribute_table_has_a_one_where_the_class_has_the_property() -> None:
    table = attribute_table((RED_BALL,))
    assert table.shape == (1, len(ATTRIBUTE_NAMES))
    assert table.dtype == np.float32
    ones = {ATTRIBUTE_NAMES[column] for column in np.flatnonzero(table[0])}
    assert ones == {"plain", "red", "white", "round", "horns", "tail"}


def test_names_are_unique_and_say_the_properties() -> None:
    assert len({creature.name for creature in CLASSES}) == 32
    assert RED_BALL.title == "round plain red creature with horns and tail"
    assert RED_BALL.name == "round_plain_red_creature_with_horns_and_tail"


def test_unknown_property_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="no such property: trunk"):
        Creature("plain", "red", "white", "round", ("horns", "trunk"))


# ---------------------------------------------------------------- the pictures


def test_same_seed_same_pixels_other_seed_other_pixels() -> None:
    first = draw_creature(RED_BALL, "a")
    assert (first.size, first.mode) == ((96, 96), "RGB")
    assert first.tobytes() == draw_creature(RED_BALL, "a").tobytes()
    assert first.tobytes() != draw_creature(RED_BALL, "b").tobytes()


@pytest.mark.parametrize("body", BODIES)
def test_colour_can_be_seen(body: str) -> None:
    """The red of a red creature's picture exceeds that of a blue one's, on the same seed."""
    red, blue = (
        pixels(draw_creature(Creature("plain", c, "white", body, ("horns", "tail")), "s")) for c in ("red", "blue")
    )
    assert (red - blue)[..., 0].max() > 80
    assert (blue - red)[..., 2].max() > 80
    assert ((red - blue)[..., 0] > 60).mean() > 0.04


@pytest.mark.parametrize("texture", [name for name in TEXTURES if name != "plain"])
def test_texture_covers_part_of_the_body(texture: str) -> None:
    plain, textured = (
        pixels(draw_creature(Creature(t, "red", "white", "square", ("horns", "tail")), "s")) for t in ("plain", texture)
    )
    changed = np.abs(plain - textured).max(axis=2) > 40
    assert 0.01 < changed.mean() < 0.3


@pytest.mark.parametrize(
    "part", ["wings", "spikes", "tail", "long legs", "horns", "long ears", "antennae", "beak", "one eye"]
)
@pytest.mark.parametrize("body", ["round", "tall", "worm-like"])
def test_part_can_be_seen(part: str, body: str) -> None:
    """A class with the part differs from the plain-faced class without it."""
    other = "wings" if part != "wings" else "spikes"
    third = "horns" if part != "horns" else "antennae"
    with_part = Creature("plain", "green", "pink", body, (part, other))
    without = Creature("plain", "green", "pink", body, (third, other))
    assert np.abs(pixels(draw_creature(with_part, "p")) - pixels(draw_creature(without, "p"))).mean() > 1


def test_background_does_not_tell_the_class() -> None:
    """The upper corners, which no creature reaches as a rule, differ no more between classes than within them."""
    colours = list(COLOURS)[:4]
    corner = np.array(
        [
            [
                pixels(draw_creature(Creature("plain", c, "white", "square", ("tail", "beak")), f"{c}/{k}"))[
                    :6, :6
                ].mean()
                for k in range(12)
            ]
            for c in colours
        ]
    )
    between, within = corner.mean(axis=1).var(ddof=1), corner.var(axis=1, ddof=1).mean() / corner.shape[1]
    assert between < 5 * within


# ---------------------------------------------------------------- the shipped data


def test_shipped_pictures_are_what_the_script_draws(script: ModuleType) -> None:
    """Decoded, since another build of the JPEG library may pack the same picture differently."""
    for creature, index in ((SEEN[0], 0), (SEEN[13], 17), (UNSEEN[7], 29)):
        with Image.open(DATA / script.image_path(creature, index)) as shipped:
            difference = np.abs(pixels(shipped) - pixels(script.picture(creature, index)))
        assert difference.mean() < 6


def test_shipped_splits_are_what_the_script_writes_and_all_files_exist(script: ModuleType) -> None:
    splits = json.loads((DATA / "splits.json").read_text(encoding="utf-8"))
    assert splits == script.splits()
    listed = [*splits["train"], *splits["test_seen"], *splits["test_unseen"]]
    assert len(set(listed)) == len(listed) == 32 * 30
    assert {str(path.relative_to(DATA).as_posix()) for path in (DATA / "images").rglob("*.jpg")} == set(listed)
    assert set(splits["validation_classes"]) < set(splits["seen_classes"])
    assert not set(splits["seen_classes"]) & set(splits["unseen_classes"])


def test_shipped_knowledge_covers_all_classes() -> None:
    names = [creature.name for creature in CLASSES]
    with np.load(DATA / "knowledge" / "attributes.npz", allow_pickle=False) as attributes:
        assert attributes["class_names"].tolist() == names
        assert attributes["attribute_names"].tolist() == list(ATTRIBUTE_NAMES)
        np.testing.assert_array_equal(attributes["vectors"], attribute_table(CLASSES))
    with np.load(DATA / "knowledge" / "minilm-l6-v2.npz", allow_pickle=False) as text:
        assert text["class_names"].tolist() == names
        vectors = text["vectors"]
    assert vectors.shape == (32, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_text_vectors_know_the_properties() -> None:
    """Classes that share more properties have more similar vectors: each vector belongs to its class."""
    with np.load(DATA / "knowledge" / "minilm-l6-v2.npz", allow_pickle=False) as text:
        vectors = text["vectors"]
    said = attribute_table(CLASSES)[:, [name not in ACCENTS for name in ATTRIBUTE_NAMES]]
    upper = np.triu_indices(len(CLASSES), 1)
    assert np.corrcoef((vectors @ vectors.T)[upper], (said @ said.T)[upper])[0, 1] > 0.4


def test_shipped_data_stay_small() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 4e6


def test_script_writes_the_same_files_twice(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "SEEN", SEEN[:1])
    monkeypatch.setattr(script, "UNSEEN", UNSEEN[:1])
    monkeypatch.setattr(script, "IMAGES_PER_CLASS", 2)
    for folder in ("a", "b"):
        script.write_images(tmp_path / folder)
    first, second = (
        {p.name + p.parent.name: p.read_bytes() for p in (tmp_path / f).rglob("*.jpg")} for f in ("a", "b")
    )
    assert len(first) == 4
    assert first == second
