"""Base models pinned by a YAML file to a commit of the Hub; two calls of the Hub's client are replaced."""

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

from lora_dag.bases import component_files
from lora_dag.bases import resolve as bases
from lora_dag.core.console import UserError, run
from lora_dag.core.params import ModelParams
from lora_dag.core.tensors import load_metadata
from lora_dag.families.protocol import load_family
from tests.helpers.errors import assert_line, assert_problem, refused
from tests.helpers.workspace import Workspace

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
    """Stand-in for the Hub with one model, a folder of files."""

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
    """Return a repository with the tiny base model and other files, pinned by data/sd15.yaml."""
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
    return ModelParams(family=family, pretrained=PIN, variant=variant, dtype="float32", quantization=None)


def resolve(model: ModelParams | None = None) -> bases.Base:
    model = model or asked()
    return bases.resolve(model, load_family(model.family))


def assert_refused(code: str, *values: str, call: Callable[[], object] = resolve) -> None:
    with refused(code, *values):
        call()


def changes(*more: str) -> list[str]:
    words = (f"model.pretrained={PIN}", "train.num_steps=2", *more)
    return [word for change in words for word in ("--set", change)]


# Fetched


def test_only_files_of_the_family_are_downloaded(hub: Hub, tiny_base: Path) -> None:
    base = resolve()
    assert hub.downloaded == NEEDED
    assert "/.state/hub/models/acme--tiny/" in base.model.pretrained
    components = load_family("sd").COMPONENTS
    own = component_files.digests(asked().model_copy(update={"pretrained": str(tiny_base)}), components)
    assert component_files.digests(base.model, components) == own
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


def test_another_variant_downloads_other_files(hub: Hub) -> None:
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
    assert f"[acme/tiny](https://huggingface.co/acme/tiny) at commit `{COMMIT}`" in card
    assert "acme/tiny@0123456789ab" in Path("reports/report.md").read_text()
    written = [*Path("data/export").rglob("*"), *Path("data/adapter").rglob("*"), *Path("reports").rglob("*")]
    assert not any(b".state" in path.read_bytes() for path in written if path.is_file())
    file = "data/export/diffusers/pytorch_lora_weights.safetensors"
    assert workspace.run("verify", file, *changes())[-1].startswith("verified")


def test_the_preflight_and_the_status_download_nothing(hub: Hub, workspace: Workspace) -> None:
    workspace.run("prepare")
    lines = workspace.run("check", *changes())
    (line,) = [line for line in lines if "downloads" in line]
    assert "vae, text_encoder, tokenizer, unet, scheduler of acme/tiny at 0123456789ab" in line
    assert not any(line.startswith("objective") for line in lines)  # its config is on the Hub
    with refused("base-not-downloaded", "data/sd15.yaml:", "`python -m stages.cache_latents`"):
        workspace.run("status", *changes())
    assert hub.calls == []
    resolve()
    assert "objective   v_prediction" in workspace.run("check", *changes())
    with refused("resolution-not-multiple", "got 36", "data/sd15.yaml", "multiples of 8", "32 or 40"):
        workspace.run("check", *changes("dataset.resolution=36"))


# Refused


@pytest.mark.parametrize(
    ("text", "code", "values"),
    [
        ("hub: acme/tiny\nrevision: main\n", "pin-revision", ("revision: got 'main'", "40 hex digits")),
        ("hub: acme/tiny\n", "pin-revision", ("revision: missing", "40 hex digits")),
        (f"hub: tiny\nrevision: {COMMIT}\n", "pin-hub", ("hub: got 'tiny'", "https://huggingface.co/owner/name")),
        (f"hub: acme/tiny\nrevision: {COMMIT}\ntoken: hf_x\n", "unknown-setting", ("token: ", "hub, revision")),
        (f"hub: acme/tiny\nrevision: {COMMIT}\nfiles: [a]\n", "unknown-setting", ("files: ", "hub, revision")),
    ],
)
def test_bad_pins(hub: Hub, workspace: Workspace, text: str, code: str, values: tuple[str, ...]) -> None:
    Path(PIN).write_text(text)
    place, *others = values
    assert_refused(code, f"{PIN} {place}", *others)
    assert_refused(code, f"{PIN} {place}", *others, call=lambda: workspace.run("check", *changes()))
    assert hub.calls == []


def test_a_missing_revision_suggests_how_to_find_the_commit(hub: Hub) -> None:
    Path(PIN).write_text("hub: acme/tiny\nrevision: main\n")
    page, command = "https://huggingface.co/acme/tiny/commits/main", "h.model_info('acme/tiny').sha"
    assert_refused("pin-revision", page, command)


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "code", "values"),
    [
        (
            errors.GatedRepoError("gated", response=response(403)),
            "hub-gated",
            (f"{PIN} hub: acme/tiny", "https://huggingface.co/acme/tiny", "`hf auth login`"),
        ),
        (
            errors.RepositoryNotFoundError("404", response=response(404)),
            "hub-no-repository",
            (f"{PIN} hub: https://huggingface.co/acme/tiny", "`hf auth login`"),
        ),
        (
            errors.RevisionNotFoundError("404", response=response(404)),
            "hub-no-revision",
            (f"{PIN} revision: acme/tiny", COMMIT, "https://huggingface.co/acme/tiny/commits/main"),
        ),
        (ConnectionError("name not known"), "hub-failed", (f"{PIN}: acme/tiny", "(name not known)")),
    ],
)
def test_failures_of_the_hub(hub: Hub, error: Exception, code: str, values: tuple[str, ...]) -> None:
    hub.error = error
    assert_refused(code, *values)


def test_a_full_disk_is_reported_as_such(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.error = OSError(errno.ENOSPC, "No space left on device", ".state/hub")
    with pytest.raises(SystemExit) as caught:
        run(resolve)
    assert caught.value.code == 2
    assert_line(capsys.readouterr().err, "disk-full", ".state/hub: No space left on device")


def test_another_family_is_refused_before_the_weights_are_fetched(hub: Hub) -> None:
    place = f"params.yaml model.pretrained: '{PIN}'"
    values = ("StableDiffusionPipeline", "'sdxl'", "StableDiffusionXLPipeline", "model.family: sd.")
    assert_refused("wrong-family", place, *values, call=lambda: resolve(asked("sdxl")))
    assert hub.downloaded == ["model_index.json"]


def test_weights_that_the_repository_lacks_are_named_before_the_others_are_fetched(hub: Hub) -> None:
    (hub.folder / "vae/diffusion_pytorch_model.safetensors").rename(hub.folder / "vae/diffusion_pytorch_model.bin")
    assert_refused("variant-missing", f"{PIN}: acme/tiny", "no vae", "'null'", "diffusion_pytorch_model.bin")
    with pytest.raises(UserError) as raised:
        resolve(asked(variant="bf16"))
    assert raised.value.codes == ("variant-missing",) * 3
    unet = "diffusion_pytorch_model.bin, diffusion_pytorch_model.fp16.safetensors, diffusion_pytorch_model.safetensors"
    assert_problem(raised.value, "variant-missing", PIN, "no vae", "'bf16'", "diffusion_pytorch_model.bin")
    assert_problem(raised.value, "variant-missing", PIN, "no text_encoder", "'bf16'", "model.safetensors")
    assert_problem(raised.value, "variant-missing", PIN, "no unet", "'bf16'", f"{unet}, my_unet.py")
    assert hub.downloaded == ["model_index.json"]


def test_a_repository_of_another_layout(hub: Hub) -> None:
    (hub.folder / "model_index.json").unlink()
    assert_refused("no-model-index", f"{PIN} hub: acme/tiny", "README.md, ")


def test_a_component_of_another_class(hub: Hub) -> None:
    path = hub.folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unet": ["diffusers", "UNet3DConditionModel"]}))
    assert_refused("wrong-family", "model_index.json unet: got UNet3DConditionModel", "UNet2DConditionModel")
