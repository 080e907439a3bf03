"""Which class becomes which when a model is converted, one file a library.

A library's file imports the library, so it is imported only where that is loaded already.
"""

import sys
from importlib import import_module

from torch.nn import Module

from fastreg.blocks.swap import Swap

# What has to be loaded, and the file that knows its classes.
FILES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "transformers.activations": "transformers.activations",
    "transformers.models.bert.modeling_bert": "transformers.bert",
    "transformers.models.electra.modeling_electra": "transformers.electra",
    "transformers.models.gpt2.modeling_gpt2": "transformers.gpt2",
    "transformers.models.roberta.modeling_roberta": "transformers.roberta",
    "transformers.models.vit.modeling_vit": "transformers.vit",
    "transformers.models.whisper.modeling_whisper": "transformers.whisper",
    "transformers.models.xlm_roberta.modeling_xlm_roberta": "transformers.xlm_roberta",
}


def known() -> tuple[dict[type[Module], Swap], dict[str, str]]:
    """All swaps of torch's classes, and of those of the libraries that are loaded, by their class.

    The second dict names libraries whose files cannot be used with the version that is loaded, and why not.
    """
    swaps: dict[type[Module], Swap] = {}
    unusable: dict[str, str] = {}
    for library, file in FILES.items():
        if library not in sys.modules:
            continue
        try:
            found = import_module(f"{__name__}.{file}").SWAPS
        except (ImportError, AttributeError) as error:  # a version without one of the classes
            unusable[library] = str(error)
            continue
        swaps.update((swap.theirs, swap) for swap in found)
    return swaps, unusable
