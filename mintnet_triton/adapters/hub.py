"""The Hugging Face hub: networks pushed, and loaded by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from mintnet_triton.adapters import library
from mintnet_triton.checkpoint import load, save
from mintnet_triton.classifier import MintClassifier
from mintnet_triton.flow import MintNet

if TYPE_CHECKING:
    from huggingface_hub import PyTorchModelHubMixin, constants, hf_hub_download
else:
    _hub = library("huggingface_hub", "hub")
    PyTorchModelHubMixin, constants = _hub.PyTorchModelHubMixin, _hub.constants
    hf_hub_download = _hub.hf_hub_download

CARD = """\
---
{{ card_data }}
---

# {{ title | default(kind, true) }}

{{ description | default("A " + kind + " of " + parameters + " parameters.", true) }}
{% if kind == "MintNet" %}It is a normalizing flow of masked convolutions over logits of images:
exact densities, and an inverse that says of every sample whether it converged.
{% else %}It is an invertible network of masked convolutions with a linear head, which returns
log-probabilities of classes.
{% endif %}
## Use

```python
from mintnet_triton.adapters.hub import HubModel

model = HubModel.from_pretrained("{{ repo_id | default("user/name", true) }}").model
```

`model.safetensors` alone is read by `mintnet_triton.load`, too.

## Architecture

| argument | value |
| --- | --- |
{% for name, value in arguments.items() %}| {{ name }} | {{ value }} |
{% endfor %}
## Training and evaluation

{{ results | default("Not told. For a flow of images, levels and logit_lambda belong here: "
"densities compare where they are the same.", true) }}

Paper: {{ paper_url }}
"""


class HubModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="mintnet-triton",
    paper_url="https://arxiv.org/abs/1907.07945",
    tags=["normalizing-flow", "invertible-network", "mintnet"],
    model_card_template=CARD,
):
    """A network that goes to the hub and comes from there; the network itself is ``.model``.

    ``HubModel(flow).push_to_hub("user/name")``, ``save_pretrained(folder)``, and
    ``HubModel.from_pretrained("user/name").model``, or of a folder, in evaluation mode. The weights
    are the file that :func:`mintnet_triton.save` writes; ``config.json`` beside it repeats the
    class and its arguments for readers of the hub. ``model_card_kwargs`` fill the card: title,
    description, results, repo_id; and all that ``ModelCardData`` knows not. Networks of a context
    that are your own come back by ``from_pretrained(..., context_network=...)``, as by ``load``.

    Args:
        model: a :class:`MintNet` or a :class:`MintClassifier`.

    Raises:
        TypeError: another kind of model. To save raises what :func:`mintnet_triton.save` does; to
            load, what :func:`mintnet_triton.load` and the hub do.
    """

    def __init__(self, model: MintNet | MintClassifier) -> None:
        super().__init__()
        if not isinstance(model, MintNet | MintClassifier):
            raise TypeError(
                f"model must be a MintNet or a MintClassifier, got {type(model).__name__}"
            )
        self.model = model

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What the network returns."""
        return self.model(*arguments, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self.model, save_directory / constants.SAFETENSORS_SINGLE_FILE)
        config = {"class": type(self.model).__name__, "arguments": self.model.arguments}
        (save_directory / constants.CONFIG_NAME).write_text(
            json.dumps(config, indent=2) + "\n", encoding="utf-8"
        )

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, map_location: str = "cpu",
        context_network: Callable[[int], nn.Module] | None = None, **download: Any,
    ) -> Self:  # fmt: skip
        file = Path(model_id) / constants.SAFETENSORS_SINGLE_FILE
        if not Path(model_id).is_dir():
            file = Path(hf_hub_download(model_id, constants.SAFETENSORS_SINGLE_FILE, **download))
        model = load(file, context_network=context_network)
        return cls(model).to(map_location).eval()

    def generate_model_card(self, *arguments: Any, **filled: Any) -> Any:
        """The card, of the template :data:`CARD`."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return super().generate_model_card(
            *arguments,
            kind=type(self.model).__name__,
            parameters=f"{count:,}",
            arguments=self.model.arguments,
            **filled,
        )
