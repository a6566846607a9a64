"""How the `specdec` command finds Medusa: its drafter and its trainer, by the entry points in pyproject.toml."""

from huggingface_hub.errors import EntryNotFoundError

from medusa.calibration import load_tree
from medusa.cli import calibrate, train
from medusa.drafter import MedusaDrafter
from medusa.heads import MedusaHeads
from specdec.cli.kinds import TrainerKind
from specdec.drafters.kinds import DrafterKind
from specdec.model.runner import ModelRunner


def make(target: ModelRunner, path: str | None) -> MedusaDrafter:
    """Heads of a folder or the hub, with the tree of their folder if it has one."""
    if path is None:
        raise ValueError("Medusa heads need their folder or hub id: medusa:path=DIR")
    heads = MedusaHeads.from_pretrained(path, target.dtype).to(target.device)
    try:
        tree = load_tree(path)
    except (FileNotFoundError, EntryNotFoundError):
        tree = None
    return MedusaDrafter(heads, tree)


DRAFTER = DrafterKind(
    "Medusa heads, with their calibrated tree",
    make,
    recognises=lambda config: (
        "medusa_num_heads" in config or config.get("model_type") == "medusa" or isinstance(config.get("medusa"), dict)
    ),
)
TRAINER = TrainerKind("Medusa heads", train.COMMAND, calibrate.COMMAND)
