"""Text for the shipped pair: the Python standard library's source, split by a fixed list of held-out modules.

Everything here is a deterministic function of the source folder, so two runs on one Python version see the same text.
"""

import ast
import hashlib
import keyword
import random
import re
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Held out of training together with their tests. Relative to the standard library's folder.
HELD_OUT = (
    "argparse.py",
    "bisect.py",
    "calendar.py",
    "colorsys.py",
    "configparser.py",
    "csv.py",
    "fractions.py",
    "heapq.py",
    "json/decoder.py",
    "json/encoder.py",
    "json/scanner.py",
    "queue.py",
    "sched.py",
    "shlex.py",
    "statistics.py",
    "textwrap.py",
    "zipfile.py",
    "http/cookies.py",
    "html/entities.py",
    "html/parser.py",
    "asyncio/queues.py",
    "concurrent/futures/thread.py",
    "mimetypes.py",
    "opcode.py",
    "token.py",
    "encodings/cp437.py",
    "encodings/cp1250.py",
    "encodings/koi8_r.py",
    "encodings/mac_greek.py",
    "encodings/iso8859_5.py",
    "test/test_argparse.py",
    "test/test_bisect.py",
    "test/test_calendar.py",
    "test/test_colorsys.py",
    "test/test_configparser.py",
    "test/test_csv.py",
    "test/test_fractions.py",
    "test/test_heapq.py",
    "test/test_queue.py",
    "test/test_sched.py",
    "test/test_shlex.py",
    "test/test_statistics.py",
    "test/test_textwrap.py",
    "test/test_zipfile.py",
    "test/test_http_cookies.py",
    "test/test_htmlparser.py",
    "test/test_mimetypes.py",
    "test/test_opcodes.py",
    "test/test_asyncio/test_queues.py",
)
MAX_FILE_BYTES = 300_000  # larger files are generated tables that would drown the code
SKIPPED_PARTS = {"site-packages", "dist-packages", "__pycache__", "bad_coding", "lib2to3"}
EDIT_MARK = "# Edited: "


def is_held_out(relative):
    """Whether a path is listed as held out, or lies in a package that a newer Python made of a listed module."""
    return any(relative == name or relative.startswith(name.removesuffix(".py") + "/") for name in HELD_OUT)


def load_corpus(folder=None, is_held_out=is_held_out, skipped_parts=SKIPPED_PARTS):
    """Return `(train, held_out)`: lists of `(relative path, text)`, duplicates removed, sorted by path.

    `is_held_out(relative path)` says which files are held out; a path with one of `skipped_parts` in it is left out.
    Raises FileNotFoundError when `folder` (default: this interpreter's standard library) has no Python files for one of
    the two lists."""
    folder = Path(folder or sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(folder.rglob("*.py")) if not skipped_parts & set(path.relative_to(folder).parts)]
    train, held_out, seen = [], [], set()
    with ThreadPoolExecutor(
        16
    ) as threads:  # on some file systems it is the waiting for one file after the other that takes the time
        for path, text in zip(paths, threads.map(_text_of, paths), strict=True):
            digest = hashlib.sha256((text or "").encode()).digest()
            if text is None or len(text) < 100 or digest in seen:
                continue
            seen.add(digest)
            relative = path.relative_to(folder).as_posix()
            (held_out if is_held_out(relative) else train).append((relative, text))
    if not train or not held_out:
        raise FileNotFoundError(
            f"no Python source to train on and to hold out under {folder}: {len(train)} training and "
            f"{len(held_out)} held-out files"
        )
    return train, held_out


def _text_of(path):
    """The text of a file, tabs expanded; None where it is no file, too large or not in UTF-8."""
    if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
        return None
    try:
        return path.read_text(encoding="utf-8").expandtabs(4)
    except UnicodeDecodeError:
        return None


def functions_of(text):
    """Yield the dedented source of every function in `text` (none where the file does not parse)."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            indent = node.col_offset
            yield (
                "\n".join(
                    line[indent:] if not line[:indent].strip() else line
                    for line in lines[node.lineno - 1 : node.end_lineno]
                )
                + "\n"
            )


def edit_example(function, rng):
    """`(prompt, answer)`: a function, then the same with one of its names changed; None if no name repeats."""
    names = [n for n in re.findall(r"\b[a-z_][a-z_0-9]{2,}\b", function) if not keyword.iskeyword(n) and n != "self"]
    repeated = sorted({n for n in names if names.count(n) >= 2})
    if not repeated:
        return None
    old = rng.choice(repeated)
    new = rng.choice([f"{old}_2", f"new_{old}", f"my_{old}", f"{old}_value", f"the_{old}", f"_{old}", f"{old}s"])
    return f"{function}\n{EDIT_MARK}{old} -> {new}", "\n" + re.sub(rf"\b{re.escape(old)}\b", new, function)


def edit_documents(files, seed=0, share=0.12):
    """Return edit examples made from the functions of `files`, about `share` of the files' characters in all."""
    rng = random.Random(seed)
    functions = [f for _, text in files for f in functions_of(text) if 4 <= f.count("\n") <= 24 and len(f) < 900]
    rng.shuffle(functions)
    budget, documents = share * sum(len(text) for _, text in files), []
    for function in functions:
        example = edit_example(function, rng)
        if example and budget > 0:
            documents.append("".join(example))
            budget -= len(documents[-1])
    return documents


def _cut(text, low, high):
    """The first lines of `text` that hold between `low` and `high` characters, without the last newline, or None."""
    taken = ""
    for line in text.splitlines(keepends=True):
        if len(taken) + len(line) > high:
            break
        taken += line
        if len(taken) >= low:
            return taken.rstrip("\n")  # the newline and the next line's indent are one token: leave it to the model
    return None


def _prose_of(text):
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            doc = ast.get_docstring(node)
            if doc and len(doc) > 500 and ">>>" not in doc[:400]:
                yield f'"""{doc}'


def _tables_of(text):
    """Runs of at least 24 consecutive lines that are all literals or constant assignments."""
    row = re.compile(
        r"""^\s*(["'(\[{]|\d|[A-Z_0-9]+\s*=\s*\d|\w+_op\(|[a-z_]+\(['"]).*[,:)\d]\s*(#.*)?$|^\s+['"].*['"].*#.*$"""
    )
    run = []
    for line in text.splitlines():
        if row.match(line):
            run.append(line)
            continue
        if len(run) >= 24:
            yield "\n".join(run) + "\n"
        run = []


def build_prompts(held_out, per_kind=8, seed=0, kinds=("code", "prose", "data", "editing"), or_fewer=False):
    """Prompts from held-out files: `{kind: [{"source", "text"}, …]}` for code, prose, data and editing.

    Raises ValueError where the files give too few of a kind, with `or_fewer` where they give none.
    """
    rng = random.Random(seed)
    pools = {"code": [], "prose": [], "data": [], "editing": []}
    for path, text in held_out:
        is_test = path.startswith("test/")
        for function in functions_of(text):
            if 14 <= function.count("\n") <= 60 and not is_test:
                pools["code"].append((path, _cut(function, rng.choice([220, 320, 420]), 600)))
            if 8 <= function.count("\n") <= 16 and 250 < len(function) < 620:
                example = edit_example(function, rng)
                if example:
                    pools["editing"].append((path, example[0]))
        if not is_test:
            pools["prose"] += [(path, _cut(doc, rng.choice([200, 300, 400]), 600)) for doc in _prose_of(text)]
        pools["data"] += [(path, _cut(table, rng.choice([250, 350, 450]), 700)) for table in _tables_of(text)]
    prompts = {}
    for kind in kinds:
        pool = pools[kind]
        rng.shuffle(pool)
        chosen, used = [], {}
        for limit in (1, 2, 4, 8):  # one prompt a file first, so that files mix
            for path, text in pool:
                if (
                    text
                    and len(chosen) < per_kind
                    and used.get(path, 0) < limit
                    and text not in [c["text"] for c in chosen]
                ):
                    chosen.append({"source": path, "text": text})
                    used[path] = used.get(path, 0) + 1
        if len(chosen) < (1 if or_fewer else per_kind):
            raise ValueError(
                f"only {len(chosen)} of {per_kind} {kind} prompts could be made from {len(held_out)} held-out files"
            )
        prompts[kind] = chosen
    return prompts
