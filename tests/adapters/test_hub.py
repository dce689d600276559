"""Networks on the Hugging Face hub, of which a folder takes the place."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

pytest.importorskip("huggingface_hub")
pytest.importorskip("jinja2")
pytest.importorskip("safetensors")

import huggingface_hub
from safetensors import safe_open

import mintnet_triton as mint
from mintnet_triton.adapters import hub
from mintnet_triton.adapters.hub import HubModel
from tests.adapters.flows import SHAPE, make_conditional_flow, make_flow, moved, samples

WEIGHTS = "model.safetensors"


def classifier() -> mint.MintClassifier:
    return moved(mint.MintClassifier(2, (4, 2), 3, pairs=2, squeezes=1, width=4)).eval()


def test_a_flow_in_a_folder(tmp_path: Path) -> None:
    flow, x = make_flow(), samples(3)
    HubModel(flow).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, "config.json", "README.md"}
    again = HubModel.from_pretrained(tmp_path)
    assert not again.training
    assert isinstance(again.model, mint.MintNet)
    torch.testing.assert_close(again(x), flow(x), rtol=0, atol=0)
    # Either way of reading takes what the other has written.
    ours = mint.load(tmp_path / WEIGHTS)
    torch.testing.assert_close(ours(x), flow(x), rtol=0, atol=0)
    mint.save(flow, tmp_path / WEIGHTS)
    torch.testing.assert_close(HubModel.from_pretrained(tmp_path)(x), flow(x), rtol=0, atol=0)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        described = json.loads(file.metadata()["mintnet_triton"])
    assert json.loads((tmp_path / "config.json").read_text()) == described
    assert described["class"] == "MintNet"
    # What came from the hub goes there again.
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == described


def test_a_conditional_flow_in_a_folder(tmp_path: Path) -> None:
    flow, x, context = make_conditional_flow(), samples(3), samples(3, shape=(3,))
    HubModel(flow).save_pretrained(tmp_path)
    again = HubModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(x, context), flow(x, context), rtol=0, atol=0)
    assert "| context | 3 |" in (tmp_path / "README.md").read_text()


def test_networks_of_ones_own_come_back(tmp_path: Path) -> None:
    def network(outputs: int) -> nn.Module:
        return nn.Linear(3, outputs)

    flow = mint.MintNet(1, 8, pairs=2, hidden=4, squeezes=1, context=3, context_network=network)
    x, context = torch.randn(2, 1, 8, 8), torch.randn(2, 3)
    HubModel(flow).save_pretrained(tmp_path)
    again = HubModel.from_pretrained(tmp_path, context_network=network)
    torch.testing.assert_close(again(x, context), flow(x, context), rtol=0, atol=0)


def test_a_classifier_in_a_folder(tmp_path: Path) -> None:
    model, x = classifier(), torch.randn(3, 2, 4, 2)
    HubModel(model).save_pretrained(tmp_path)
    again = HubModel.from_pretrained(str(tmp_path)).model
    assert isinstance(again, mint.MintClassifier)
    torch.testing.assert_close(again(x), model(x))
    assert "log-probabilities of classes" in (tmp_path / "README.md").read_text()


def test_pushed_and_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow, repository = make_flow(), tmp_path / "repository"

    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> str:
            assert repo_id == "someone/flow"
            shutil.copytree(folder_path, repository)
            return "done"

    def download(repo_id: str, filename: str, **options: Any) -> str:
        assert repo_id == "someone/flow"
        assert options["revision"] == "main"
        return str(repository / filename)

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", download)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    card = {"title": "Digits", "repo_id": "someone/flow", "results": "1.9 bits"}
    assert HubModel(flow).push_to_hub("someone/flow", model_card_kwargs=card) == "done"
    again = HubModel.from_pretrained("someone/flow", revision="main")
    torch.testing.assert_close(again(samples(2).fill_(0.3)), flow(samples(2).fill_(0.3)))
    text = (repository / "README.md").read_text()
    assert "# Digits\n" in text
    assert 'from_pretrained("someone/flow")' in text
    assert "1.9 bits" in text


def test_the_card(tmp_path: Path) -> None:
    flow = make_flow()
    HubModel(flow).save_pretrained(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "mintnet-triton"
    assert {"mintnet", "normalizing-flow"} <= set(card.data.tags)
    count = sum(parameter.numel() for parameter in flow.parameters())
    assert f"A MintNet of {count:,} parameters." in card.text
    for name, value in flow.arguments.items():
        assert f"| {name} | {value} |" in card.text
    assert "levels and logit_lambda belong here" in card.text
    assert "https://arxiv.org/abs/1907.07945" in card.text
    assert "{" + "{" not in card.text


def test_what_would_not_be_read_back_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model must be a MintNet or a MintClassifier, got Linear"):
        HubModel(nn.Linear(2, 2))  # type: ignore[arg-type]
    flow = make_flow()
    layer = next(one for one in flow.modules() if isinstance(one, mint.MintLayer))
    prune.random_unstructured(layer.conv2, "weight", 0.5)
    with pytest.raises(mint.CheckpointError, match="would not be read back"):
        HubModel(flow).save_pretrained(tmp_path)
    assert not (tmp_path / WEIGHTS).exists()
    with pytest.raises(FileNotFoundError):
        HubModel.from_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(mint.CheckpointError):
        HubModel.from_pretrained(tmp_path)


def test_it_takes_gradients_and_copies(tmp_path: Path) -> None:
    flow = make_flow()
    module = HubModel(flow)
    assert [id(one) for one in module.parameters()] == [id(one) for one in flow.parameters()]
    z, log_det = module(samples(2))
    assert z.shape == (2, *flow.latent_shape)
    (z.sum() + log_det.sum()).backward()
    assert all(one.grad is not None for one in flow.parameters())
    assert flow.image_shape == SHAPE
