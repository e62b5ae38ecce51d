"""A base that a YAML file pins to a commit of the Hub; the Hub is a stand-in for its client's two calls."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from lora_dag.bases import layout as base_files
from lora_dag.bases import resolve as bases
from lora_dag.core.console import UserError, run
from lora_dag.core.params import ModelParams
from lora_dag.core.tensors import load_metadata
from lora_dag.families.protocol import load_family
from tests.conftest import Workspace

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIN = "data/sd15.yaml"
NEEDED = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


@dataclass
class Hub:
    """One model, as a folder of files."""

    folder: Path
    error: Exception | None = None
    calls: list[str] = field(default_factory=list)

    def model_info(self, repo_id: str, revision: str) -> Any:
        assert (repo_id, revision) == ("acme/tiny", COMMIT)
        self.calls.append("info")
        if self.error:
            raise self.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names()])

    def snapshot_download(self, repo_id: str, *, repo_type: str, revision: str, local_dir: Path, **options: Any) -> str:
        assert (repo_id, repo_type, revision) == ("acme/tiny", "model", COMMIT)
        for name in filter_repo_objects(self.names(), **options):
            self.calls.append(name)
            (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, local_dir / name)
        return str(local_dir)

    def names(self) -> list[str]:
        return [path.relative_to(self.folder).as_posix() for path in sorted(self.folder.rglob("*")) if path.is_file()]

    @property
    def downloaded(self) -> list[str]:
        return sorted(set(self.calls) - {"info"})


@pytest.fixture
def hub(workspace: Workspace, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The tiny base among what else a repository holds, pinned by data/sd15.yaml."""
    made = Hub(workspace.path / "remote")
    shutil.copytree(tiny_base, made.folder)
    for name in ("sd-v1.safetensors", "README.md", "unet/diffusion_pytorch_model.bin", "unet/my_unet.py"):
        (made.folder / name).write_bytes(b"not for us")
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "safety_checker/model.safetensors"):
        (made.folder / name).parent.mkdir(exist_ok=True)
        (made.folder / name).write_bytes(b"not asked for")
    monkeypatch.setattr(huggingface_hub, "model_info", made.model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    Path(PIN).write_text(f"hub: acme/tiny\nrevision: {COMMIT}\n")
    return made


def asked(family: str = "sd", variant: str | None = None) -> ModelParams:
    return ModelParams(family=family, pretrained=PIN, variant=variant, dtype="float32")


def resolve(model: ModelParams | None = None) -> bases.Base:
    model = model or asked()
    return bases.resolve(model, load_family(model.family))


def refusals(call: Callable[[], object] = resolve) -> list[str]:
    with pytest.raises(UserError) as caught:
        call()
    assert all("\n" not in line for line in caught.value.problems)
    return list(caught.value.problems)


def refusal(call: Callable[[], object] = resolve) -> str:
    (line,) = refusals(call)
    return line


def changes(*more: str) -> list[str]:
    words = (f"model.pretrained={PIN}", "train.num_steps=2", *more)
    return [word for change in words for word in ("--set", change)]


# Fetched


def test_what_the_family_loads_is_fetched_and_nothing_else(hub: Hub, tiny_base: Path) -> None:
    base = resolve()
    assert hub.downloaded == NEEDED
    assert "/.state/hub/models/acme--tiny/" in base.model.pretrained
    components = load_family("sd").COMPONENTS
    own = base_files.digests(asked().model_copy(update={"pretrained": str(tiny_base)}), components)
    assert base_files.digests(base.model, components) == own
    assert (base.name, base.revision, base.label) == ("acme/tiny", COMMIT, "acme/tiny@0123456789ab")


def test_no_network_is_needed_afterwards(hub: Hub) -> None:
    first = resolve()
    hub.error, hub.calls = ConnectionError("no network"), []
    assert resolve() == first and hub.calls == []


def test_a_changed_file_is_fetched_again(hub: Hub) -> None:
    path = Path(resolve().model.pretrained) / "unet/diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    assert Path(resolve().model.pretrained) == path.parents[1] and path.read_bytes() == whole


def test_another_variant_is_another_choice_of_files(hub: Hub) -> None:
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        shutil.copy(hub.folder / f"{name}.safetensors", hub.folder / f"{name}.fp16.safetensors")
    base = resolve(asked(variant="fp16"))
    expected = [name.replace(".safetensors", ".fp16.safetensors") for name in NEEDED]
    assert hub.downloaded == expected
    assert resolve().model.pretrained != base.model.pretrained


def test_the_headers_and_the_card_name_id_and_commit(hub: Hub, workspace: Workspace) -> None:
    for stage in ("prepare", "cache_latents", "train", "validate", "export", "report"):
        workspace.run(stage, *changes())
    record = json.loads(load_metadata(Path("data/export/diffusers/pytorch_lora_weights.safetensors"))["lora_dag"])
    assert (record["base_name"], record["base_revision"]) == ("acme/tiny", COMMIT)
    card = Path("reports/model_card.md").read_text()
    assert 'base_model: "acme/tiny"\n' in card
    assert f'from_pretrained("acme/tiny", revision="{COMMIT}", safety_checker=None)' in card
    assert f"The base is [acme/tiny](https://huggingface.co/acme/tiny) at commit `{COMMIT}`; its digests stand" in card
    assert "acme/tiny@0123456789ab" in Path("reports/report.md").read_text()
    written = [*Path("data/export").rglob("*"), *Path("data/adapter").rglob("*"), *Path("reports").rglob("*")]
    assert not any(b".state" in path.read_bytes() for path in written if path.is_file())
    file = "data/export/diffusers/pytorch_lora_weights.safetensors"
    assert workspace.run("verify", file, *changes())[-1].startswith("verified")


def test_the_preflight_and_the_status_download_nothing(hub: Hub, workspace: Workspace) -> None:
    workspace.run("prepare")
    lines = workspace.run("check", *changes())
    assert (
        "            not fetched yet: `python -m stages.cache_latents` downloads vae, text_encoder, tokenizer, unet,"
        " scheduler of acme/tiny at 0123456789ab"
    ) in lines
    assert not any(line.startswith("objective") for line in lines)  # its config is on the Hub
    found = refusal(lambda: workspace.run("status", *changes()))
    assert found == "data/sd15.yaml: not fetched yet; run `python -m stages.cache_latents`"
    assert hub.calls == []
    resolve()
    assert "objective   v_prediction" in workspace.run("check", *changes())
    found = refusal(lambda: workspace.run("check", *changes("dataset.resolution=36")))
    assert found.endswith("36 is no multiple of 8, which data/sd15.yaml needs; use 32 or 40")


# Refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hub: acme/tiny\nrevision: main\n", "revision: got 'main'; expected a commit of 40 hex digits"),
        ("hub: acme/tiny\n", "revision: missing; expected a commit of 40 hex digits"),
        (
            f"hub: tiny\nrevision: {COMMIT}\n",
            "hub: got 'tiny'; expected owner/name, as in https://huggingface.co/owner",
        ),
        (f"hub: acme/tiny\nrevision: {COMMIT}\ntoken: hf_x\n", "token: unknown key (known: hub, revision)"),
        (f"hub: acme/tiny\nrevision: {COMMIT}\nfiles: [a]\n", "files: unknown key (known: hub, revision)"),
    ],
)
def test_bad_pins(hub: Hub, workspace: Workspace, text: str, message: str) -> None:
    Path(PIN).write_text(text)
    assert refusal().startswith(f"{PIN} {message}")
    assert refusal(lambda: workspace.run("check", *changes())).startswith(f"{PIN} {message}")
    assert hub.calls == []


def test_the_refusal_says_how_to_find_the_commit(hub: Hub) -> None:
    Path(PIN).write_text("hub: acme/tiny\nrevision: main\n")
    assert "https://huggingface.co/acme/tiny/commits/main" in refusal()
    assert "h.model_info('acme/tiny').sha" in refusal()


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.GatedRepoError("gated", response=response(403)),
            f"{PIN} hub: acme/tiny is gated; accept its terms at https://huggingface.co/acme/tiny and run"
            " `hf auth login`",
        ),
        (
            errors.RepositoryNotFoundError("404", response=response(404)),
            f"{PIN} hub: no model https://huggingface.co/acme/tiny; check the name, or run `hf auth login` if it is"
            " private",
        ),
        (
            errors.RevisionNotFoundError("404", response=response(404)),
            f"{PIN} revision: acme/tiny has no commit {COMMIT}; see https://huggingface.co/acme/tiny/commits/main",
        ),
        (
            ConnectionError("name not known"),
            f"{PIN}: acme/tiny cannot be downloaded (name not known); run again, it goes on from there",
        ),
    ],
)
def test_the_hub_does_not_give_it(hub: Hub, error: Exception, message: str) -> None:
    hub.error = error
    assert refusal() == message


def test_a_full_disk_is_told_as_one(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.error = OSError(errno.ENOSPC, "No space left on device", ".state/hub")
    with pytest.raises(SystemExit) as caught:
        run(resolve)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: .state/hub: No space left on device; free some space\n"


def test_another_family_is_refused_before_the_weights_are_fetched(hub: Hub) -> None:
    assert refusal(lambda: resolve(asked("sdxl"))) == (
        f"params.yaml model.pretrained: '{PIN}' is a StableDiffusionPipeline; model.family 'sdxl' trains"
        " StableDiffusionXLPipeline; use model.family: sd"
    )
    assert hub.downloaded == ["model_index.json"]


def test_weights_that_the_repository_lacks_are_named_before_the_others_are_fetched(hub: Hub) -> None:
    (hub.folder / "vae/diffusion_pytorch_model.safetensors").rename(hub.folder / "vae/diffusion_pytorch_model.bin")
    lacks = f"{PIN}: acme/tiny has no %s weights of model.variant '%s' as safetensors; it has %s"
    assert refusals() == [lacks % ("vae", "null", "diffusion_pytorch_model.bin")]
    unet = "diffusion_pytorch_model.bin, diffusion_pytorch_model.fp16.safetensors, diffusion_pytorch_model.safetensors"
    assert refusals(lambda: resolve(asked(variant="bf16"))) == [
        lacks % ("vae", "bf16", "diffusion_pytorch_model.bin"),
        lacks % ("text_encoder", "bf16", "model.safetensors"),
        lacks % ("unet", "bf16", f"{unet}, my_unet.py"),
    ]
    assert hub.downloaded == ["model_index.json"]


def test_a_repository_of_another_layout(hub: Hub) -> None:
    (hub.folder / "model_index.json").unlink()
    assert refusal().startswith(
        f"{PIN} hub: acme/tiny has no model_index.json, so not the diffusers layout; it has README.md, "
    )


def test_a_component_of_another_class(hub: Hub) -> None:
    path = hub.folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unet": ["diffusers", "UNet3DConditionModel"]}))
    assert "got UNet3DConditionModel, expected UNet2DConditionModel" in refusal()
