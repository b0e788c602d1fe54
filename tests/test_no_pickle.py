"""Nothing that comes from outside is run: no pickle is read, no code of a checkpoint is imported."""

import ast
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, dynamic_module_utils

from attribution.files import CorruptTableError
from attribution.files import load as load_table
from moeify.data import prepared
from moeify.data.images import load as load_images
from moeify.data.tokens import prepare
from moeify.models.pretrained import look
from moeify.parts import known
from moeify.recipe.data import ImageSource, JsonLines, TextData
from moeify.recipe.load import RecipeError, parse_recipe
from moeify.split_folder import load_split
from moeify.store import CorruptCheckpointError, FolderStore, read_manifest, write_folder, write_manifest
from tests.checkpoints import save_checkpoint
from tests.texts import write_texts

ROOT = Path(__file__).parent.parent

# --- the code -----------------------------------------------------------------------------------------

OBJECTS = frozenset(
    f"torch.distributed.{name}"
    for name in (
        "all_gather_object",
        "broadcast_object_list",
        "gather_object",
        "scatter_object_list",
        "send_object_list",
        "recv_object_list",
    )
)
"""Collectives that pickle."""
EXCEPTIONS = {
    "moeify/world.py": (
        {"torch.distributed.broadcast_object_list", "torch.distributed.all_gather_object"},
        "workers of one run tell each other plain values, over connections of their own",
    ),
    "moeify/shared_memory.py": (
        {"torch.distributed.all_gather_object"},
        "two workers of one run on one machine agree on memory that both reach",
    ),
    "moeify/__init__.py": ({"import by a computed name"}, "one of the package's own modules, from a table beside it"),
    "pipelines/cli.py": ({"import by a computed name"}, "one of the package's own commands, from a list of them"),
    "pipelines/studies/catalogue.py": ({"import by a computed name"}, "one of the package's own studies, from a list"),
}
"""Where the scan finds something that stays, all that it finds there, and why."""
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
REFUSED = {
    "builtins.eval",
    "builtins.exec",
    "builtins.compile",
    "torch.load",
    "torch.hub",
    "torch.package",
    "torch.serialization",
    "torch.jit.load",
    "pandas.read_pickle",
    "numpy.memmap",
    "runpy",
    *(
        f"yaml.{name}"
        for name in (
            *("load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all", "Loader", "CLoader"),
            *("FullLoader", "CFullLoader", "UnsafeLoader", "CUnsafeLoader"),
        )
    ),
    *OBJECTS,
}
"""With all that is below them. The strict reader of recipes stands on ``yaml.SafeLoader``, and needs no exception."""
HEADERS = {"numpy.lib.format.dtype_to_descr", "numpy.lib.format.write_array_header_1_0"}
"""What writes the head of an array's file; the rest of ``numpy.lib.format`` reads arrays."""
IMPORTERS = {"importlib.import_module", "builtins.__import__"}


def full_names(tree: ast.AST) -> dict[str, str]:
    """Return what each imported name stands for."""
    names = {name: f"builtins.{name}" for name in ("eval", "exec", "compile", "__import__")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {each.asname or each.name.split(".")[0]: each.name for each in node.names if each.asname}
            names |= {each.name.split(".")[0]: each.name.split(".")[0] for each in node.names if not each.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    return names


def full_name(node: ast.AST, names: dict[str, str]) -> str | None:
    """Return the dotted name that an expression is, None for any other."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (of := full_name(node.value, names)):
        return f"{of}.{node.attr}"
    return None


def says(call: ast.Call, keyword: str, value: object) -> bool:
    return any(k.arg == keyword and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)


def findings(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of everything in a module that may run what it reads."""
    tree = ast.parse(source)
    names = full_names(tree)
    sound = {
        id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and says(node, "allow_pickle", False)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((node.lineno, found) for each in node.names if (found := refused(each.name)))
            case ast.ImportFrom(module=str(module), level=0):
                imported = (refused(module) or refused(f"{module}.{each.name}") for each in node.names)
                yield from ((node.lineno, found) for found in imported if found and found not in OBJECTS)
            case ast.Call():
                yield from ((node.lineno, found) for found in of_call(node, names))
            case ast.Dict():
                yield from (
                    (node.lineno, "trust_remote_code")
                    for key, value in zip(node.keys, node.values, strict=True)
                    if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and not is_false(value)
                )
            case ast.Subscript(slice=ast.Constant(value="trust_remote_code"), ctx=ast.Store()):
                yield node.lineno, "trust_remote_code"
            case ast.Name(ctx=ast.Load()) | ast.Attribute():
                name = full_name(node, names)
                if name == "numpy.load" and id(node) not in sound:
                    yield node.lineno, name
                elif name and (found := refused(name)):
                    yield node.lineno, found
                elif isinstance(node, ast.Attribute) and node.attr == "read_pickle":
                    yield node.lineno, "pandas.read_pickle"


def refused(name: str) -> str | None:
    """Return what a dotted name is refused as, None where it is not."""
    parts = name.split(".")
    if parts[0] in PICKLES:
        return parts[0]
    if parts[:3] == ["numpy", "lib", "format"] and len(parts) > 3 and name not in HEADERS:
        return name
    return next((each for n in range(1, len(parts) + 1) if (each := ".".join(parts[:n])) in REFUSED), None)


def of_call(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    """Yield what a call is refused for besides its name."""
    for keyword in call.keywords:
        if keyword.arg == "trust_remote_code" and not is_false(keyword.value):
            yield "trust_remote_code"
        if keyword.arg in ("weights_only", "use_safetensors") and is_false(keyword.value):
            yield f"{keyword.arg}=False"
    if full_name(call.func, names) in IMPORTERS:
        match call.args[:1]:
            case [ast.Constant(value=str(module))]:
                if found := refused(module):
                    yield found
            case _:
                yield "import by a computed name"


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_no_module_reads_what_may_run_code() -> None:
    found: dict[str, set[str]] = {}
    lines = []
    paths = [
        path for package in ("attribution", "moeify", "pipelines") for path in sorted((ROOT / package).rglob("*.py"))
    ]
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        allowed, _ = EXCEPTIONS.get(name, (set(), ""))
        for line, what in findings(path.read_text(encoding="utf-8")):
            found.setdefault(name, set()).add(what)
            if what not in allowed:
                lines.append(f"{name}:{line}: {what}")
    assert len(paths) > 200
    assert lines == []
    assert found == {name: what for name, (what, _) in EXCEPTIONS.items()}  # none that is no longer needed


@pytest.mark.parametrize(
    "source",
    [
        *(f"import {name}" for name in sorted(PICKLES)),
        "from pickle import loads",
        "import dill.session as s",
        "def f():\n    import pickle as p",
        "import importlib\nimportlib.import_module('pickle')",
        "from importlib import import_module\nimport_module(name)",
        "__import__(name)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=True)",
        "import torch as t\nread = t.load",
        "from torch import load",
        "from torch.serialization import load as read",
        "import torch\ntorch.hub.load('a/b', 'c')",
        "from torch import hub",
        "from torch.hub import load_state_dict_from_url",
        "import torch\ntorch.jit.load(path)",
        "import pandas as pd\npd.read_pickle(path)",
        "frames().read_pickle(path)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import yaml\nyaml.unsafe_load(text)",
        "import yaml\nclass Own(yaml.FullLoader): ...",
        "from yaml import UnsafeLoader",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, allow_pickle=given)",
        "import numpy as np\nlist(map(np.load, paths))",
        "from numpy import load\nload(path, mmap_mode='r')",
        "import numpy as np\nnp.lib.format.read_array(file)",
        "from numpy.lib.format import open_memmap",
        "import numpy as np\nnp.memmap(path, dtype=object)",
        "eval(text)",
        "exec(text)",
        "list(map(eval, texts))",
        "compile(text, 'x', 'exec')",
        "import builtins\nbuiltins.eval(text)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "AutoModel.from_pretrained(folder, trust_remote_code=given)",
        "AutoModel.from_pretrained(folder, use_safetensors=False)",
        "safe = {'trust_remote_code': True}",
        "safe['trust_remote_code'] = True",
        "import torch.distributed as dist\ndist.all_gather_object(boxes, value)",
        "from torch import distributed\ndistributed.broadcast_object_list(box)",
        "from torch.distributed import scatter_object_list as scatter\nscatter(box, boxes)",
    ],
)
def test_the_scan_refuses(source: str) -> None:
    assert list(findings(source))


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.loads(text)",
        "from safetensors.torch import load_file\nload_file(path)",
        "from attribution.files import load\nload(path)",
        "import numpy as np\nnp.load(path, mmap_mode='r', allow_pickle=False)",
        "import numpy as np\nnp.lib.format.dtype_to_descr(np.dtype(np.uint16))",
        "import numpy as np\nnp.fromfile(path, np.uint8)",
        "network.eval()",
        "import torch\ntorch.compile(network)\nmodel.load(tensors)",
        "import re\nre.compile(text)",
        "import yaml\nclass Own(yaml.SafeLoader): ...\nyaml.dump(data)",
        "AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)",
        "safe = {'trust_remote_code': False}",
        "from importlib import import_module\nimport_module('pipelines.cli')",
        "from . import pickle_free",
        "import torch.distributed as dist\ndist.all_reduce(flat)",
        "'import pickle'",
    ],
)
def test_the_scan_lets_pass(source: str) -> None:
    assert list(findings(source)) == []


# --- hostile files ------------------------------------------------------------------------------------


class Payload:
    """Writes its marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.marker,)


def pickled(marker: Path) -> bytes:
    return pickle.dumps(Payload(marker))


def write_pickle(marker: Path, path: Path) -> None:
    path.write_bytes(pickled(marker))


def write_torch(marker: Path, path: Path) -> None:
    torch.save({"weight": Payload(marker)}, path)


def write_array(marker: Path, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([Payload(marker)], dtype=object), allow_pickle=True)


WRITERS = pytest.mark.parametrize("write", [write_pickle, write_torch])


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the file that no test may leave; fails too where torch is asked to read a pickle, however carefully."""
    asked: list[object] = []

    def load(file: object, *_: object, **__: object) -> None:
        asked.append(file)
        raise AssertionError(f"torch.load({file})")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", load)
        yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists()
    assert asked == []


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (write_pickle, lambda path: pickle.loads(path.read_bytes())),
        (write_torch, lambda path: torch.load(path, weights_only=False)),
        (write_array, lambda path: np.load(path, allow_pickle=True)),
    ],
)
def test_the_payload_goes_off_where_it_is_read(
    write: Callable[[Path, Path], None], read: Callable[[Path], object], tmp_path: Path
) -> None:
    write(tmp_path / "marker", tmp_path / "file")
    assert not (tmp_path / "marker").exists()
    read(tmp_path / "file")
    assert (tmp_path / "marker").exists()


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@WRITERS
def test_weights_as_a_pickle_are_refused_alone_and_ignored_beside_safetensors(
    write: Callable[[Path, Path], None], marker: Path, tmp_path: Path
) -> None:
    folder = save_checkpoint(tmp_path / "llama", "llama")
    wanted = load_file(folder / "model.safetensors")
    write(marker, folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin.index.json").write_text('{"metadata": {}, "weight_map": {"x": "pytorch_model.bin"}}')
    network = look(folder).network()
    assert all(torch.equal(tensor, network.get_parameter(name)) for name, tensor in wanted.items())
    (folder / "model.safetensors").rename(folder / "unnamed.safetensors")
    with pytest.raises(ValueError, match="llama cannot be read"):
        look(folder).network()
    (folder / "unnamed.safetensors").unlink()
    with pytest.raises(ValueError, match=r"as a pickle, pytorch_model\.bin, which is never read"):
        look(folder)


@WRITERS
def test_a_pickle_called_safetensors_is_refused(
    write: Callable[[Path, Path], None], marker: Path, tmp_path: Path
) -> None:
    folder = save_checkpoint(tmp_path / "llama", "llama")
    write(marker, folder / "model.safetensors")
    with pytest.raises(ValueError, match="llama cannot be read"):
        look(folder).network()


@WRITERS
def test_no_index_and_no_configuration_leads_to_a_pickle(
    write: Callable[[Path, Path], None], marker: Path, tmp_path: Path
) -> None:
    folder = save_checkpoint(tmp_path / "llama", "llama")
    write(marker, folder / "adapter_model.bin")
    shards = dict.fromkeys(load_file(folder / "model.safetensors"), "adapter_model.bin")
    index = json.dumps({"metadata": {}, "weight_map": shards})
    (folder / "other.safetensors.index.json").write_text(index)
    for named, told in (
        ("adapter_model.bin", "names 'adapter_model.bin' as a file of weights, which is never read"),
        ("other.safetensors.index.json", "names 'adapter_model.bin' as a file of weights, which is never read"),
        (["adapter_model.bin"], "as a file of weights, which is never read"),
    ):
        change_json(folder / "config.json", transformers_weights=named)
        with pytest.raises(ValueError, match=told):
            look(folder)
    change_json(folder / "config.json", transformers_weights=None)
    (folder / "model.safetensors").rename(folder / "unnamed.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"names 'adapter_model\.bin' as a file of weights, which is never read"):
        look(folder)
    for damaged in ("[]", "{", '{"weight_map": ["x"]}'):
        (folder / "model.safetensors.index.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"has a model\.safetensors\.index\.json that cannot be read"):
            look(folder)


def test_shards_of_safetensors_are_read(marker: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "llama", "llama")
    wanted = look(folder).network()
    wanted.save_pretrained(tmp_path / "shards", max_shard_size="10KB")  # type: ignore[operator]
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    network = look(tmp_path / "shards").network()
    assert all(torch.equal(tensor, network.get_parameter(name)) for name, tensor in wanted.named_parameters())


@WRITERS
def test_an_adapter_as_a_pickle_is_never_read(
    write: Callable[[Path, Path], None], marker: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    folder = save_checkpoint(tmp_path / "llama", "llama")
    write(marker, folder / "adapter_model.bin")
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="llama cannot be read"):
        look(folder).network()


@pytest.mark.parametrize("write", [write_pickle, write_array])
def test_prepared_data_that_holds_objects_is_prepared_anew(
    write: Callable[[Path, Path], None], marker: Path, tmp_path: Path
) -> None:
    source = JsonLines(kind="jsonl", path=write_texts(tmp_path))
    data = TextData.model_validate({"kind": "text", "source": source, "vocabulary": 300, "length": 8, "test": 0.2})
    before = prepare(data, tmp_path / "cache", tmp_path)
    (index,) = (tmp_path / "cache").rglob("index.json")
    stream = index.parent / "train.0.npy"
    whole = stream.read_bytes()
    stream.unlink()  # which is mapped
    write(marker, stream)
    files = json.loads(index.read_text())["files"]
    change_json(index, files={**files, stream.name: prepared._hash(stream)})
    assert prepared._read(index.parent) is None
    after = prepare(data, tmp_path / "cache", tmp_path)
    assert stream.read_bytes() == whole
    assert np.array_equal(before.streams["train"][0], after.streams["train"][0])


def write_npz(marker: Path, path: Path) -> None:
    objects = np.array([Payload(marker)], dtype=object)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=True, data=objects, offsets=objects, labels=objects)


@pytest.mark.parametrize(
    ("source", "name", "write"),
    [
        ("cifar10-jpeg", "cifar10-jpeg/cifar10_train_jpeg.npz", write_npz),
        ("cifar10-jpeg", "cifar10-jpeg/cifar10_train_jpeg.npz", write_pickle),
        ("cifar10-jpeg", "cifar10-jpeg/cifar10_train_jpeg.npz", write_array),
        ("cifar10", "cifar-10-batches-bin/data_batch_1.bin", write_pickle),
        ("mnist", "mnist/train-images-idx3-ubyte", write_pickle),
    ],
)
def test_images_as_a_pickle_are_refused(
    source: ImageSource, name: str, write: Callable[[Path, Path], None], marker: Path, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir()
    write(marker, tmp_path / name)
    with pytest.raises(ValueError, match=r"is damaged"):
        load_images(source, tmp_path)


@WRITERS
def test_a_pickle_in_a_checkpoint_of_a_run_is_refused_though_its_hash_holds(
    write: Callable[[Path, Path], None], marker: Path, tmp_path: Path
) -> None:
    store = FolderStore(tmp_path, keep=2)
    store.save("000001", {}, {"split": {"w": torch.ones(3)}})
    folder = tmp_path / "checkpoints" / "000001"
    write(marker, folder / "split.safetensors")
    write_manifest(folder, {}, {"split.safetensors": known(folder / "split.safetensors")})
    found = store.newest()
    assert found is not None
    assert found.damaged == ()
    with pytest.raises(CorruptCheckpointError, match=r"000001: split\.safetensors cannot be read"):
        store.tensors("000001", "split")
    write(marker, folder / "manifest.json")
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json cannot be read"):
        store.newest()


@WRITERS
def test_a_pickle_as_a_split_model_or_as_a_table_is_refused(
    write: Callable[[Path, Path], None], marker: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "split"
    write_folder(folder, {"partition": {}}, {"model": {"w": torch.ones(3)}})
    write(marker, folder / "model.safetensors")
    facts: dict[str, Any] = read_manifest(folder)["facts"]
    write_manifest(folder, facts, {"model.safetensors": known(folder / "model.safetensors")})
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors cannot be read"):
        load_split(folder)
    with pytest.raises(CorruptTableError, match="cannot be read as a table"):
        load_table(folder / "model.safetensors")


def test_a_recipe_makes_no_objects(marker: Path) -> None:
    for tag in ("!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"):
        with pytest.raises(RecipeError, match=r"tags .* are not allowed"):
            parse_recipe(f"name: {tag} ['{marker}']", where="hostile")


# --- code of a checkpoint -----------------------------------------------------------------------------


def add_code(folder: Path, marker: Path) -> None:
    """Write modules that leave the marker when they are imported, and have the checkpoint name them."""
    for name in ("configuration", "modeling", "tokenization"):
        body = f"from pathlib import Path\n\nPath({str(marker)!r}).touch()\n\n\nclass Own: ...\n"
        (folder / f"{name}_own.py").write_text(body)
    change_json(
        folder / "config.json",
        auto_map={
            "AutoConfig": "configuration_own.Own",
            "AutoModel": "modeling_own.Own",
            "AutoModelForCausalLM": "modeling_own.Own",
        },
    )
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})


def test_the_code_goes_off_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = save_checkpoint(tmp_path / "llama", "llama")
    add_code(folder, tmp_path / "marker")
    with pytest.raises(AttributeError):  # what was imported is no configuration
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (tmp_path / "marker").exists()


def test_code_of_a_checkpoint_of_a_known_family_is_ignored(marker: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "llama", "llama")
    before = look(folder).network()
    add_code(folder, marker)
    checkpoint = look(folder)
    network = checkpoint.network()
    assert type(network) is type(before)
    assert all(torch.equal(tensor, network.get_parameter(name)) for name, tensor in before.named_parameters())
    assert checkpoint.tokenizer().vocab_size > 0
    assert checkpoint.generation(0)


def test_a_checkpoint_that_cannot_do_without_its_code_is_refused(marker: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "llama", "llama")
    add_code(folder, marker)
    change_json(folder / "config.json", model_type="own", architectures=["Own"])
    with pytest.raises(ValueError, match=r"architectures Own, code of .* own \(auto_map\), which is never run; wanted"):
        look(folder)


def test_a_tokenizer_of_a_checkpoints_own_code_is_never_imported(marker: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "llama", "llama")
    add_code(folder, marker)
    change_json(folder / "tokenizer_config.json", tokenizer_class="Own")
    with pytest.raises(ValueError, match=r"llama .* is code of .* own \(auto_map\), which is never run; wanted"):
        look(folder).tokenizer()
