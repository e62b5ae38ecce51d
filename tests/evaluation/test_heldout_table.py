"""The frozen table: its rows, names, file, and the figures of its losses."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from lora_dag.evaluation import heldout_table
from lora_dag.evaluation.heldout_table import Picture, Score

STRETCH_OF_TWO = 12.70620 / 1.959964 * 2**0.5  # t over z at 1 degree of freedom, and the jackknife's


def make_pictures(count: int, split: str = "heldout") -> list[Picture]:
    return [
        Picture(f"{split}{index:03}", f"{index}.png", split, f"thing {index}", f"key{index}") for index in range(count)
    ]


@pytest.mark.parametrize(("num_strata", "num_train_timesteps"), [(1, 1), (1, 1000), (8, 1000), (7, 1000), (10, 10)])
def test_strata_cover_the_schedule_from_first_to_last_timestep(num_strata: int, num_train_timesteps: int) -> None:
    drawn = [heldout_table.strata(seed, "view", num_strata, num_train_timesteps) for seed in range(300)]
    for timesteps in drawn:
        assert timesteps == sorted(set(timesteps))
        assert [t * num_strata // num_train_timesteps for t in timesteps] == list(range(num_strata))
    everything = list(itertools.chain(*drawn))
    assert min(everything) < max(1, num_train_timesteps // num_strata // 20)
    assert max(everything) >= num_train_timesteps - 1 - num_train_timesteps // num_strata // 20


def test_every_timestep_of_a_stratum_can_be_drawn() -> None:
    drawn = {t for seed in range(400) for t in heldout_table.strata(seed, "view", 2, 20)}
    assert drawn == set(range(20))


def test_more_strata_than_timesteps_is_refused() -> None:
    with pytest.raises(ValueError, match="11 strata of 10 timesteps"):
        heldout_table.strata(0, "view", 11, 10)


def test_adding_pictures_leaves_old_rows_as_they_were() -> None:
    few = heldout_table.table(make_pictures(3), 4, 1000, seed=0)
    many = heldout_table.table(make_pictures(9), 4, 1000, seed=0)
    assert set(few) < set(many)


def test_a_row_keeps_its_name_whatever_else_is_asked() -> None:
    few, many = (heldout_table.table(make_pictures(count), 4, 1000, seed=0) for count in (3, 9))
    named = dict(zip(many, heldout_table.row_names(many, 0, {"vae": "a"}), strict=True))
    assert [named[row] for row in few] == heldout_table.row_names(few, 0, {"vae": "a"})
    assert len(set(named.values())) == len(many)
    assert not set(named.values()) & {*heldout_table.row_names(many, 1, {"vae": "a"})}
    assert not set(named.values()) & {*heldout_table.row_names(many, 0, {"vae": "b"})}


def test_another_seed_or_picture_gives_other_timesteps() -> None:
    rows = {heldout_table.strata(seed, view, 8, 1000)[3] for seed in range(5) for view in "abcde"}
    assert len(rows) > 15


def test_choice_ignores_names_and_order_and_balances_the_splits() -> None:
    pictures = make_pictures(5) + make_pictures(20, "train")
    chosen = heldout_table.choose(reversed(pictures), max_pictures=4)
    assert [p.content for p in chosen] == [
        *("heldout000", "heldout001", "heldout002", "heldout003"),
        *("train000", "train001", "train002", "train003"),
    ]
    assert len(heldout_table.choose(pictures, max_pictures=64)) == 10


def test_digest_sees_captions_seed_and_components() -> None:
    rows = heldout_table.table(make_pictures(2), 2, 1000, seed=0)
    other = [dataclasses.replace(p, caption="changed") for p in make_pictures(2)]
    digests = [
        heldout_table.digest(rows, 0, {"scheduler": "a", "vae": "b"}),
        heldout_table.digest(heldout_table.table(other, 2, 1000, seed=0), 0, {"scheduler": "a", "vae": "b"}),
        heldout_table.digest(rows, 1, {"scheduler": "a", "vae": "b"}),
        heldout_table.digest(rows, 0, {"scheduler": "another", "vae": "b"}),
        heldout_table.digest(rows, 0, {"scheduler": "a", "vae": "another"}),
    ]
    assert len(set(digests)) == 5


def test_neither_names_nor_the_encoders_settings_make_another_table() -> None:
    def digest(pictures: list[Picture]) -> str:
        return heldout_table.digest(heldout_table.table(heldout_table.choose(pictures, 2), 2, 1000, seed=0), 0, {})

    pictures = make_pictures(4) + make_pictures(4, "train")
    others = [
        dataclasses.replace(p, file_name=f"{9 - i}.png", view=f"key{9 - i}", mask=f"mask{i}")
        for i, p in enumerate(pictures)
    ]
    assert digest(others) == digest(pictures)


def test_twins_keep_their_order_when_they_are_renamed() -> None:
    twins = [Picture("same", f"{name}.png", "heldout", caption, "key") for name, caption in ("ax", "by")]
    renamed = [Picture("same", f"{name}.png", "heldout", caption, "key") for name, caption in ("bx", "ay")]
    assert [p.caption for p in heldout_table.choose(renamed, 2)] == [p.caption for p in heldout_table.choose(twins, 2)]


def test_rows_of_a_picture_are_resampled_together() -> None:
    # Two pictures that differ, each with 50 equal rows: taken row by row, the interval would be ten times too narrow.
    scores = [Score(f"{i}-{t}", f"{i}.png", "heldout", t, 1.0, float(i)) for i in range(2) for t in range(50)]
    values = heldout_table.mean_change(scores)
    assert values.tolist() == [-1.0, 0.0]


def test_metrics_by_hand() -> None:
    scores = [
        Score("row0", "a.png", "heldout", 100, 1.0, 0.5),
        Score("row1", "a.png", "heldout", 900, 0.4, 0.3),
        Score("row2", "b.png", "heldout", 200, 2.0, 1.0),
        Score("row3", "b.png", "heldout", 800, 0.2, 0.2),
        Score("row4", "c.png", "train", 100, 1.0, 0.1),
        Score("row5", "c.png", "train", 900, 1.0, 0.1),
    ]
    measured = heldout_table.metrics(scores, 1000, seed=0)
    assert measured["val.loss"] == pytest.approx(0.5)
    assert measured["val.loss_base"] == pytest.approx(0.9)
    assert measured["val.loss_change"] == pytest.approx(-0.4)
    assert measured["val.loss_change_low"] == pytest.approx(-0.4 - 0.1 * STRETCH_OF_TWO)
    assert measured["val.loss_change_high"] == pytest.approx(-0.4 + 0.1 * STRETCH_OF_TWO)
    assert measured["val.overfit_gap"] == pytest.approx(0.9 - 0.4)
    assert measured["val.loss_low_noise"] == pytest.approx(0.75)
    assert measured["val.loss_high_noise_base"] == pytest.approx(0.3)
    assert np.isnan(measured["val.loss_mid_noise"])


def test_scores_survive_the_file() -> None:
    scores = [
        Score("row", 'odd, "name".png', "heldout", 0, 1 / 3, 2e-7),
        Score("row6", "b.png", "train", 999, 12.0, 0.5),
    ]
    text = heldout_table.write_scores(scores)
    assert text.splitlines()[0] == "row,file_name,split,timestep,base,adapter"
    read = heldout_table.read_scores(text)
    assert [(s.file_name, s.split, s.timestep) for s in read] == [(s.file_name, s.split, s.timestep) for s in scores]
    assert read[0].base == 0.333333
    assert heldout_table.write_scores(read) == text
