"""Checkpoints in one file: their conversion, and every stage on them."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_dag.artifacts.lineage import load as load_lineage
from lora_dag.bases import component_files, conversion, diffusers_folder
from lora_dag.bases import resolve as bases
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import sha256_file
from lora_dag.core.params import FAMILIES, ModelParams
from lora_dag.core.tensors import load_metadata, load_tensors, save_tensors
from lora_dag.families.protocol import load_family
from tests.helpers import single_files
from tests.helpers.errors import assert_line, assert_problem, refused
from tests.helpers.families import case
from tests.helpers.single_files import Tensors, checkpoint, lay_out, of
from tests.helpers.workspace import Workspace

STATE = Path("state/bases")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_STATE_DIR", "state")


@pytest.fixture
def sd(tiny_base: Path) -> Path:
    """Write data/mine, of family sd, and return the checkpoint."""
    return lay_out(Path("data/mine"), tiny_base, checkpoint(tiny_base))


def asked(family: str = "sd", pretrained: str = "data/mine", variant: str | None = None) -> ModelParams:
    return ModelParams(family=family, pretrained=pretrained, variant=variant, dtype="float32", quantization=None)


def resolve(model: ModelParams | None = None, make: bool = True) -> Path:
    model = model or asked()
    return Path(bases.resolve(model, load_family(model.family), make).model.pretrained)


def refusal(code: str, *values: str, model: ModelParams | None = None) -> Problem:
    """Return the only problem of the base model, which has this code and these values; nothing is left behind."""
    with refused(code, *values) as raised:
        resolve(model or asked())
    assert not list(STATE.glob("*"))
    return raised.value.problems[0]


def edit(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_tensors(file, change(load_tensors(file)))


# Converted


@pytest.mark.parametrize("name", FAMILIES)
def test_the_converted_base_has_the_digests_of_the_original(name: str, bases: dict[str, Path]) -> None:
    """Digests cover names and bytes. Components that are not in the file come from the folder."""
    if (make := case(name).SINGLE_FILE) is None:
        pytest.skip("no test makes such a file")
    base, tensors, family = bases[name], make(bases[name]), load_family(name)
    starts = family.SINGLE_FILE.component_prefixes.items()
    inside = {component for component, prefixes in starts if any(key.startswith(prefixes) for key in tensors)}
    with_weights = {path.parent.name for path in base.glob("*/*.safetensors")}
    lay_out(Path("data/mine"), base, tensors, tuple(with_weights - inside - {family.DENOISER}))
    folder = resolve(asked(name))
    own, converted = (component_files.digests(asked(name, str(root)), family.COMPONENTS) for root in (base, folder))
    assert own == converted


def test_weights_beside_the_file_are_not_copied(bases: dict[str, Path]) -> None:
    base, beside = bases["sd3"], ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    lay_out(Path("data/mine"), base, single_files.sd3_transformer(base), beside)
    assert (resolve(asked("sd3")) / "vae/diffusion_pytorch_model.safetensors").samefile(
        "data/mine/vae/diffusion_pytorch_model.safetensors"
    )


def test_configs_are_the_folder_s_own_to_the_byte(sd: Path) -> None:
    path = Path("data/mine/unet/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_diffusers_version": "0.29.0"}))
    assert (resolve() / "unet/config.json").read_bytes() == path.read_bytes()


def test_once(sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve()
    monkeypatch.setattr(conversion, "write_folder", None)
    assert resolve() == resolve(make=False) == folder
    monkeypatch.setattr(conversion, "VERSION", 0)
    with refused("checkpoint-not-converted", str(sd), "`python -m stages.cache_latents`"):
        resolve(make=False)


def test_the_vae_of_the_file_wins(sd: Path, tiny_base: Path) -> None:
    shutil.copytree(tiny_base / "vae", "data/mine/vae", dirs_exist_ok=True)
    edit(sd, lambda tensors: {n: t + 1 if n.startswith("first_stage") else t for n, t in tensors.items()})
    assert torch.equal(
        of(resolve() / "vae")["encoder.conv_in.weight"], of(tiny_base / "vae")["encoder.conv_in.weight"] + 1
    )


@pytest.mark.parametrize("of_unet", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_component_keeps_its_dtype(sd: Path, tiny_base: Path, of_unet: torch.dtype) -> None:
    """Only float8 is widened, to bfloat16. A component with two dtypes is float32."""

    def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.startswith("model."):
            return tensor.to(of_unet)
        is_half = not name.startswith("cond_stage") or name.endswith("bias")
        return tensor.half() if is_half else tensor.bfloat16()

    edit(sd, lambda tensors: {name: cast(name, tensor) for name, tensor in tensors.items()})
    folder, given = resolve(), load_tensors(sd)
    kept = {"unet": of_unet if of_unet.itemsize > 1 else torch.bfloat16, "vae": torch.float16}
    for component, dtype in (kept | {"text_encoder": torch.float32}).items():
        found = of(folder / component)
        assert {tensor.dtype for tensor in found.values()} == {dtype}
    for component, of_file in (("unet", single_files.unet), ("vae", single_files.vae)):
        stem = "model.diffusion_model." if component == "unet" else "first_stage_model."
        for name, tensor in of_file(of(folder / component)).items():
            assert torch.equal(tensor.float(), given[stem + name].float()), name


def test_a_variant_names_the_files_that_are_converted_too(sd: Path) -> None:
    folder = resolve(asked(variant="fp16"))
    assert (folder / "unet/diffusion_pytorch_model.fp16.safetensors").exists()
    assert diffusers_folder.folder_problems(asked(variant="fp16", pretrained=str(folder)), load_family("sd")) == []


def test_indexes_of_shards_that_came_with_the_configs_are_left(sd: Path) -> None:
    index = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    Path("data/mine/unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert diffusers_folder.folder_problems(asked(pretrained=str(resolve())), load_family("sd")) == []


def test_a_killed_conversion_is_done_again(sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt  # as of Ctrl-C; the signal itself is ignored in a background job

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "files_in", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resolve()
    assert list(STATE.iterdir()) == []
    whole = resolve()
    left = whole.rename(STATE / f".{whole.name}.new")  # as SIGKILL leaves it
    (left / "unet/config.json").write_text("half")
    assert resolve() == whole and (whole / "unet/config.json").read_text() != "half"
    assert list(STATE.iterdir()) == [whole]


def test_a_damaged_conversion_is_done_again(sd: Path) -> None:
    path = resolve() / "unet/diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    assert resolve() == path.parents[1] and path.read_bytes() == whole


def test_a_second_process_waits_for_the_conversion(
    sd: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="lora-dag")
    write, started, go_on, written = conversion.write_folder, threading.Event(), threading.Event(), []

    def slow(folder: Path, *rest: object) -> None:
        started.set()
        assert go_on.wait(60)
        write(folder, *rest)  # type: ignore[arg-type]
        written.append(folder)

    monkeypatch.setattr(conversion, "write_folder", slow)
    threads = [threading.Thread(target=resolve) for _ in range(2)]
    threads[0].start()
    assert started.wait(60)
    threads[1].start()
    while "wait        for process" not in caplog.text:
        assert threads[1].is_alive()
        time.sleep(0.01)
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(written) == 1 and f"for process {os.getpid()}" in caplog.text and str(sd) in caplog.text


# The stages


def changes(family: str = "sd") -> list[str]:
    words = ("model.pretrained=data/mine", f"model.family={family}", "train.num_steps=2")
    return [word for change in words for word in ("--set", change)]


def test_a_file_trains_the_adapter_that_its_folder_trains(workspace: Workspace, tiny_base: Path) -> None:
    file = lay_out(Path("data/mine"), tiny_base, checkpoint(tiny_base))
    folder = [*changes(), "--set", "model.pretrained=data/base"]
    workspace.run("prepare")
    for stage in ("cache_latents", "train"):
        workspace.run(stage, *folder)
    adapter = Path("data/adapter/adapter.safetensors").read_bytes()
    shutil.rmtree("data/adapter")
    assert workspace.run("cache_latents", *changes())[-3] == "images      encoded 0, reused 8"
    for stage in ("train", "validate", "export", "report"):
        workspace.run(stage, *changes())
    assert Path("data/adapter/adapter.safetensors").read_bytes() == adapter
    header = load_metadata(Path("data/export/diffusers/pytorch_lora_weights.safetensors"))
    assert header["ss_sd_model_name"] == "dreamshaper.safetensors"
    assert header["ss_new_sd_model_hash"] == sha256_file(file)
    assert json.loads(header["lora_dag"])["base_name"] == "mine"
    assert load_lineage(Path("reports/validate/lineage.json"))["model"]["pretrained"] == "mine"
    card = Path("reports/model_card.md").read_text()
    assert f"The base is the checkpoint `dreamshaper.safetensors` (SHA-256 `{sha256_file(file)}`)" in card
    load_as_said("unet.conv_in.weight", of(tiny_base / "unet")["conv_in.weight"])
    assert recorded()["load"] in card


def recorded() -> dict[str, str]:
    return load_lineage(Path("reports/export/lineage.json"))["pipeline"]


def load_as_said(name: str, expected: torch.Tensor) -> None:
    """Run the recorded lines that load the base model, and compare a weight."""
    scope: dict[str, object] = {}
    exec(f"from diffusers import {recorded()['class']}\n{recorded()['load']}", scope)
    pipe = scope["pipe"]
    component, _, rest = name.partition(".")
    found = getattr(pipe, component).state_dict()[rest]
    assert torch.equal(found, expected)


def test_every_stage_on_a_file_of_family_sdxl_with_a_vae_beside_it(
    workspace: Workspace, bases: dict[str, Path]
) -> None:
    base = bases["sdxl"]
    tensors = {name: t for name, t in checkpoint(base).items() if not name.startswith("first_stage_model.")}
    lay_out(Path("data/mine"), base, tensors, beside=("vae",))
    for stage in ("prepare", "cache_latents", "train", "export"):
        workspace.run(stage, *changes("sdxl"))
    measured = json.loads(Path("reports/export/metrics.json").read_text())
    assert measured["export.comfyui.max_abs_error"] <= 1e-5 < measured["export.effect"]
    load_as_said("vae.encoder.conv_in.weight", of(base / "vae")["encoder.conv_in.weight"])


def test_the_preflight_and_the_status_convert_nothing(workspace: Workspace, tiny_base: Path) -> None:
    lay_out(Path("data/mine"), tiny_base, checkpoint(tiny_base))
    workspace.run("prepare")
    lines = workspace.run("check", *changes())
    (line,) = [line for line in lines if "converted once" in line]
    assert "vae, text_encoder, unet of dreamshaper.safetensors" in line and " 2 MB " in line
    assert "objective   v_prediction" in lines
    with refused("checkpoint-not-converted", "data/mine/dreamshaper.safetensors"):
        workspace.run("status", *changes())
    assert not Path(".state/bases").exists()
    with refused("resolution-not-multiple", "got 36", "data/mine", "multiples of 8", "32 or 40"):
        workspace.run("check", *changes(), "--set", "dataset.resolution=36")


# Refused


def test_a_lora(sd: Path) -> None:
    save_tensors(sd, {"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(1)})
    refusal("lora-as-base", str(sd), "lora_unet_down_blocks_0.lora_down.weight")


def test_a_pickle(sd: Path) -> None:
    sd.rename("data/mine/dreamshaper.ckpt")
    refusal("pickle-weights", "data/mine/dreamshaper.ckpt", ".safetensors")


def test_two_checkpoints(sd: Path) -> None:
    shutil.copy(sd, "data/mine/other.safetensors")
    refusal("several-checkpoints", "data/mine: 2 checkpoints", "dreamshaper.safetensors, other.safetensors")


def test_the_file_itself_is_named(sd: Path) -> None:
    place = "params.yaml model.pretrained: 'data/mine/dreamshaper.safetensors'"
    command = "hf download OWNER/NAME --include '*.json' --include '*.txt' --include '*.model'"
    text = refusal("checkpoint-not-in-folder", place, command, model=asked(pretrained=str(sd)))
    assert text.endswith(" --local-dir data/mine/dreamshaper")


def test_a_file_alone(sd: Path) -> None:
    Path("data/mine/model_index.json").unlink()
    repository = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    command = f"hf download {repository} --include '*.json' --include '*.txt' --include '*.model' --local-dir data/mine"
    refusal("no-model-index", str(sd), command)


def test_a_checkpoint_of_another_family(sd: Path, bases: dict[str, Path]) -> None:
    save_tensors(sd, checkpoint(bases["sdxl"]))
    command = "hf download stabilityai/stable-diffusion-xl-base-1.0 "
    refusal("wrong-family", str(sd), "'sdxl'", "model.family is 'sd'", "model.family: sdxl", command)
    index, pipeline = "data/mine/model_index.json", "StableDiffusionXLPipeline"
    refusal("wrong-family", index, pipeline, "dreamshaper.safetensors", command, model=asked("sdxl"))


def test_tensors_under_diffusers_names(sd: Path, tiny_base: Path) -> None:
    save_tensors(sd, of(tiny_base / "unet"))
    refusal("wrong-family", str(sd), "data/mine/unet/diffusion_pytorch_model.safetensors")


def test_a_file_of_something_else(sd: Path) -> None:
    save_tensors(sd, {"emb_params": torch.zeros(1)})
    refusal("wrong-family", f"{sd}: no checkpoint", "model.diffusion_model.input_blocks.0.0.weight", "emb_params")


def test_a_file_cut_short(sd: Path) -> None:
    sd.write_bytes(sd.read_bytes()[:-1])
    refusal("base-damaged", str(sd))


@pytest.mark.parametrize("change", [{"shape": [-1, 2]}, {"dtype": None}, {"dtype": "F4"}], ids=str)
def test_a_damaged_header(sd: Path, change: dict[str, object]) -> None:
    content = sd.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = min(name for name in header if name.startswith("first_stage_model."))
    header[name] = {key: value for key, value in (header[name] | change).items() if value is not None}
    text = json.dumps(header).encode()
    sd.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    refusal("base-damaged", str(sd))


def test_quantized_weights(sd: Path) -> None:
    name = "model.diffusion_model.input_blocks.0.0.weight"
    edit(sd, lambda tensors: tensors | {name: tensors[name].to(torch.int8)})
    refusal("checkpoint-quantized", str(sd), f"{name} is I8", "float16, bfloat16 or float32")


@pytest.mark.parametrize(
    ("end", "dtype", "shown"), [("", torch.int8, "I8"), ("", torch.int32, "I32"), (".scale_weight", torch.half, "F16")]
)
@pytest.mark.parametrize("part", ["cond_stage_model.", "first_stage_model."])
def test_quantized_weights_beside_the_denoiser(sd: Path, part: str, end: str, dtype: torch.dtype, shown: str) -> None:
    name = min(name for name in load_tensors(sd) if name.startswith(part) and name.endswith("weight"))
    edit(sd, lambda tensors: tensors | {name + end: tensors[name].to(dtype)})
    refusal("checkpoint-quantized", str(sd), f"{name}{end} is {shown}")


def test_positions_and_counters_are_no_quantized_weights(sd: Path) -> None:
    positions = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    edit(sd, lambda tensors: tensors | positions | {"first_stage_model.model_ema.num_updates": torch.tensor(3)})
    resolve()


def test_more_of_a_component_than_the_configs_describe(sd: Path) -> None:
    whole, extra = load_tensors(sd), {"first_stage_model.encoder.extra.weight": torch.zeros(7)}
    save_tensors(sd, whole | extra)
    refusal("checkpoint-mismatch", f"{sd}: ", " weights of vae", "vae/config.json")
    layer = "cond_stage_model.transformer.text_model.encoder.layers."
    last = max(int(name.removeprefix(layer).split(".")[0]) for name in whole if name.startswith(layer))
    old, new = f"{layer}{last}.", f"{layer}{last + 1}."
    save_tensors(sd, whole | {n.replace(old, new): t.clone() for n, t in whole.items() if n.startswith(old)})
    layers = f"{last + 2} layers of text_encoder"
    refusal("checkpoint-mismatch", str(sd), layers, f"text_encoder/config.json describes {last + 1}.")


def test_missing_components(sd: Path) -> None:
    edit(sd, lambda tensors: {n: t for n, t in tensors.items() if n.startswith("model.")})
    fetch = "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --include '%s/*.safetensors' --local-dir data/mine"
    with pytest.raises(UserError) as raised:
        resolve()
    assert raised.value.codes == ("component-missing",) * 2
    for name in ("vae", "text_encoder"):
        assert_problem(raised.value, "component-missing", str(sd), f"data/mine/{name}", "'null'", fetch % name)


def test_sd3_needs_no_t5_if_the_index_declares_it_null(bases: dict[str, Path]) -> None:
    base = bases["sd3"]
    tensors = single_files.sd3_transformer(base)
    lay_out(Path("data/mine"), base, tensors, beside=("vae", "text_encoder", "text_encoder_2"))
    refusal("component-missing", "data/mine/dreamshaper.safetensors", "text_encoder_3", model=asked("sd3"))
    index = Path("data/mine/model_index.json")
    null = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    index.write_text(json.dumps(json.loads(index.read_text()) | null))
    found = component_files.digests(asked("sd3", str(resolve(asked("sd3")))), load_family("sd3").COMPONENTS)
    assert found["text_encoder_3"] == "absent"


def test_a_file_that_lacks_tensors(sd: Path) -> None:
    edit(sd, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("encoder.conv_in.bias")})
    refusal("checkpoint-mismatch", str(sd), "vae/config.json")


@pytest.mark.parametrize("factor", [1, -1])
def test_a_file_with_another_denoiser_than_the_configs_describe(sd: Path, factor: int) -> None:
    """diffusers silently ignores tensors whose names it does not know."""
    name = "model.diffusion_model.input_blocks.1.0.in_layers.0.weight"  # [32]
    if factor > 0:
        edit(sd, lambda tensors: tensors | {f"{name}.extra": torch.zeros(32)})
    else:
        edit(sd, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    text = refusal("checkpoint-mismatch", str(sd), "weights of unet", "unet/config.json")
    present, described = (int(number.replace(",", "")) for number in re.findall(r" (\d[\d,]+)\b", text))
    assert present - described == factor * 32


def test_another_shape(sd: Path) -> None:
    edit(sd, lambda tensors: tensors | {"first_stage_model.encoder.conv_in.weight": torch.zeros(8, 4, 3, 3)})
    refusal("checkpoint-mismatch", str(sd), "vae/config.json", "(ValueError: ")


@pytest.mark.parametrize(
    ("mark", "key", "value", "got", "suggested"),
    [
        ("v_pred", "prediction_type", "epsilon", '"epsilon"', '"v_prediction"'),
        ("ztsnr", "rescale_betas_zero_snr", False, "false", "true"),
    ],
)
def test_markers_of_the_prediction_type_match_the_scheduler(
    sd: Path, mark: str, key: str, value: object, got: str, suggested: str
) -> None:
    edit(sd, lambda tensors: tensors | {mark: torch.zeros(0)})
    path = Path("data/mine/scheduler/scheduler_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refusal("scheduler-mismatch", f"{path} {key}: got {got}", sd.name, mark, f"Write {suggested}.")


def test_no_space(sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    refusal("disk-full", "state: 0.0 GB free", "dreamshaper.safetensors", "LORA_STATE_DIR")


def test_a_checkpoint_beside_a_complete_folder_is_ignored_with_a_warning(
    sd: Path, tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tiny_base, "data/mine", dirs_exist_ok=True)
    assert resolve() == Path("data/mine")
    messages = "\n".join(record.getMessage() for record in caplog.records)
    assert_line(messages, "checkpoint-ignored", str(sd), "data/mine/unet")
