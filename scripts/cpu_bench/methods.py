"""What `scripts.bench_cpu` compares: an engine, and a kind of decoding there."""

from dataclasses import dataclass

PLAIN, CHAIN, LOOKUP, MEDUSA = KINDS = ("plain", "chain", "lookup", "medusa")
OURS, BASE, TRANSFORMERS = "ours", "base", "transformers"
# engines by what users call them -> their files in `engines`
FILES = {
    OURS: "ours", BASE: "ours", TRANSFORMERS: "transformers", "llama.cpp": "llama_cpp", "openvino": "openvino",
    "onnxruntime": "onnxruntime",
}  # fmt: skip
PEERS = tuple(FILES)[3:]  # what is not installed with this library


@dataclass(frozen=True, slots=True)
class Method:
    """A kind of decoding in an engine; `mode` is that of our runner."""

    engine: str
    kind: str
    mode: str = "auto"

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.engine} {self.kind}" + ("" if self.mode == "auto" else f", {self.mode}")


def methods_of(options) -> list[Method]:
    """The methods of a run: Medusa heads are ours and fit the shipped target; larger batches and `--base` are ours."""
    kinds = [kind for kind in KINDS if kind in options.kinds]
    if options.shape != "pair":
        kinds = [kind for kind in kinds if kind in (PLAIN, CHAIN)]
    found = [Method(OURS, kind) for kind in kinds]
    if CHAIN in kinds:
        found += [Method(OURS, CHAIN, mode) for mode in options.modes]
    engines = [BASE] if options.base else []
    if options.batch == 1:
        engines += [TRANSFORMERS, *options.peers]
    return found + [Method(engine, k) for engine in engines for k in kinds if k != MEDUSA or engine == BASE]


def pairs_of(methods: list[Method]) -> list[tuple[str, str]]:
    """Whose speeds are divided by whose: ours by every other engine's of the same kind, and each by its own plain."""
    ours = [method for method in methods if method.engine == OURS]
    found = [(one.name, other.name) for one in ours for other in methods
             if other.engine != OURS and other.kind == one.kind and one.mode == "auto"]  # fmt: skip
    plain = {method.engine: method.name for method in methods if method.kind == PLAIN}
    found += [(method.name, other.name) for method in ours for other in ours
              if method.mode == "auto" != other.mode and method.kind == other.kind]  # fmt: skip
    return found + [(method.name, plain[method.engine]) for method in methods
                    if method.kind != PLAIN and method.mode == "auto" and method.engine in plain]  # fmt: skip
