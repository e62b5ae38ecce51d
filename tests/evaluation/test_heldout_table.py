"""The frozen table: its rows, names, file, and the metrics of its losses."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from lora_dag.evaluation import heldout_table
from lora_dag.evaluation.heldout_table import EvalImage, Score

STRETCH_OF_TWO = 12.70620 / 1.959964 * 2**0.5  # t over z at 1 degree of freedom, and the jackknife's


def make_images(count: int, split: str = "heldout") -> list[EvalImage]:
    return [
        EvalImage(f"{split}{index:03}", f"{index}.png", split, f"thing {index}", f"key{index}")
        for index in range(count)
    ]


@pytest.mark.parametrize(("num_strata", "num_train_timesteps"), [(1, 1), (1, 1000), (8, 1000), (7, 1000), (10, 10)])
def test_strata_cover_the_schedule_from_first_to_last_timestep(num_strata: int, num_train_timesteps: int) -> None:
    drawn = [heldout_table.stratified_timesteps(seed, "view", num_strata, num_train_timesteps) for seed in range(300)]
    for timesteps in drawn:
        assert timesteps == sorted(set(timesteps))
        assert [t * num_strata // num_train_timesteps for t in timesteps] == list(range(num_strata))
    everything = list(itertools.chain(*drawn))
    assert min(everything) < max(1, num_train_timesteps // num_strata // 20)
    assert max(everything) >= num_train_timesteps - 1 - num_train_timesteps // num_strata // 20


def test_every_timestep_of_a_stratum_can_be_drawn() -> None:
    drawn = {t for seed in range(400) for t in heldout_table.stratified_timesteps(seed, "view", 2, 20)}
    assert drawn == set(range(20))


def test_more_strata_than_timesteps_is_refused() -> None:
    with pytest.raises(ValueError, match="11 .* 10"):
        heldout_table.stratified_timesteps(0, "view", 11, 10)


def test_adding_images_changes_no_other_row() -> None:
    few = heldout_table.make_rows(make_images(3), 4, 1000, seed=0)
    many = heldout_table.make_rows(make_images(9), 4, 1000, seed=0)
    assert set(few) < set(many)


def test_row_digest_is_independent_of_other_rows() -> None:
    few, many = (heldout_table.make_rows(make_images(count), 4, 1000, seed=0) for count in (3, 9))
    named = dict(zip(many, heldout_table.row_digests(many, 0, {"vae": "a"}), strict=True))
    assert [named[row] for row in few] == heldout_table.row_digests(few, 0, {"vae": "a"})
    assert len(set(named.values())) == len(many)
    assert not set(named.values()) & {*heldout_table.row_digests(many, 1, {"vae": "a"})}
    assert not set(named.values()) & {*heldout_table.row_digests(many, 0, {"vae": "b"})}


def test_timesteps_depend_on_seed_and_image() -> None:
    rows = {heldout_table.stratified_timesteps(seed, view, 8, 1000)[3] for seed in range(5) for view in "abcde"}
    assert len(rows) > 15


def test_choose_images_ignores_names_and_order_and_balances_the_splits() -> None:
    images = make_images(5) + make_images(20, "train")
    chosen = heldout_table.choose_images(reversed(images), max_images=4)
    assert [p.content for p in chosen] == [
        *("heldout000", "heldout001", "heldout002", "heldout003"),
        *("train000", "train001", "train002", "train003"),
    ]
    assert len(heldout_table.choose_images(images, max_images=64)) == 10


def test_table_digest_changes_with_captions_seed_and_components() -> None:
    rows = heldout_table.make_rows(make_images(2), 2, 1000, seed=0)
    other = [dataclasses.replace(p, caption="changed") for p in make_images(2)]
    digests = [
        heldout_table.table_digest(rows, 0, {"scheduler": "a", "vae": "b"}),
        heldout_table.table_digest(heldout_table.make_rows(other, 2, 1000, seed=0), 0, {"scheduler": "a", "vae": "b"}),
        heldout_table.table_digest(rows, 1, {"scheduler": "a", "vae": "b"}),
        heldout_table.table_digest(rows, 0, {"scheduler": "another", "vae": "b"}),
        heldout_table.table_digest(rows, 0, {"scheduler": "a", "vae": "another"}),
    ]
    assert len(set(digests)) == 5


def test_file_names_and_encoder_settings_do_not_change_the_table() -> None:
    def table_digest(images: list[EvalImage]) -> str:
        return heldout_table.table_digest(
            heldout_table.make_rows(heldout_table.choose_images(images, 2), 2, 1000, seed=0), 0, {}
        )

    images = make_images(4) + make_images(4, "train")
    others = [
        dataclasses.replace(p, file_name=f"{9 - i}.png", view=f"key{9 - i}", mask=f"mask{i}")
        for i, p in enumerate(images)
    ]
    assert table_digest(others) == table_digest(images)


def test_renaming_identical_images_keeps_their_order() -> None:
    twins = [EvalImage("same", f"{name}.png", "heldout", caption, "key") for name, caption in ("ax", "by")]
    renamed = [EvalImage("same", f"{name}.png", "heldout", caption, "key") for name, caption in ("bx", "ay")]
    assert [p.caption for p in heldout_table.choose_images(renamed, 2)] == [
        p.caption for p in heldout_table.choose_images(twins, 2)
    ]


def test_rows_of_an_image_are_resampled_together() -> None:
    # Two images that differ, each with 50 equal rows: taken row by row, the interval would be ten times too narrow.
    scores = [Score(f"{i}-{t}", f"{i}.png", "heldout", t, 1.0, float(i)) for i in range(2) for t in range(50)]
    values = heldout_table.mean_change(scores)
    assert values.tolist() == [-1.0, 0.0]


def test_loss_metrics_equal_a_hand_computation() -> None:
    scores = [
        Score("row0", "a.png", "heldout", 100, 1.0, 0.5),
        Score("row1", "a.png", "heldout", 900, 0.4, 0.3),
        Score("row2", "b.png", "heldout", 200, 2.0, 1.0),
        Score("row3", "b.png", "heldout", 800, 0.2, 0.2),
        Score("row4", "c.png", "train", 100, 1.0, 0.1),
        Score("row5", "c.png", "train", 900, 1.0, 0.1),
    ]
    measured = heldout_table.loss_metrics(scores, 1000, seed=0)
    assert measured["val.loss"] == pytest.approx(0.5)
    assert measured["val.loss_base"] == pytest.approx(0.9)
    assert measured["val.loss_change"] == pytest.approx(-0.4)
    assert measured["val.loss_change_low"] == pytest.approx(-0.4 - 0.1 * STRETCH_OF_TWO)
    assert measured["val.loss_change_high"] == pytest.approx(-0.4 + 0.1 * STRETCH_OF_TWO)
    assert measured["val.overfit_gap"] == pytest.approx(0.9 - 0.4)
    assert measured["val.loss_low_noise"] == pytest.approx(0.75)
    assert measured["val.loss_high_noise_base"] == pytest.approx(0.3)
    assert np.isnan(measured["val.loss_mid_noise"])


def test_scores_survive_a_csv_round_trip() -> None:
    scores = [
        Score("row", 'odd, "name".png', "heldout", 0, 1 / 3, 2e-7),
        Score("row6", "b.png", "train", 999, 12.0, 0.5),
    ]
    text = heldout_table.scores_to_csv(scores)
    assert text.splitlines()[0] == "row,file_name,split,timestep,base,adapter"
    read = heldout_table.scores_from_csv(text)
    assert [(s.file_name, s.split, s.timestep) for s in read] == [(s.file_name, s.split, s.timestep) for s in scores]
    assert read[0].base == 0.333333
    assert heldout_table.scores_to_csv(read) == text
