"""A TensorRT network from an ONNX file: the file checked first, the parser's errors read, its precision read back."""
# pyright: reportUnknownMemberType=false
# (onnx.load leaves the type of a path open)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.errors import ArtifactError, BadRequest, ExportError, first_line
from exporters.spec import ExportSpec, Profiles, Shape
from exporters.tensorrt.library import Library, builder, clean

AGAIN = "export the ONNX file again"
HEAVY = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")
TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8", "FP8": "fp8"}
Bounds = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # input -> min, opt, max


def check_file(path: Path) -> None:
    """Refuses what TensorRT's parser would accept in silence, or name in words that help nobody.

    Raises:
        ArtifactError: the file is no ONNX model, has no graph or no output, lacks its external data, or is written in
            an operator set or IR version that no released ONNX has.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' is not an ONNX model ({first_line(error)})", AGAIN) from None
    if not model.graph.node or not model.graph.output:
        raise ArtifactError(f"'{path}' holds no graph with an output", AGAIN)
    newest = onnx.defs.onnx_opset_version()
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if not 1 <= opset <= newest:
        raise ArtifactError(
            f"'{path}' is written in operator set {opset}: ONNX {onnx.__version__} ends at {newest}", AGAIN
        )
    if not 1 <= model.ir_version <= onnx.IR_VERSION:
        raise ArtifactError(f"'{path}' has IR version {model.ir_version}: the newest is {onnx.IR_VERSION}", AGAIN)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(path, {e.key: e.value for e in tensor.external_data}, tensor.name)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ArtifactError(f"'{path}' is not valid ONNX ({first_line(error)})", AGAIN) from None


def _check_external(path: Path, entry: Mapping[str, str], name: str) -> None:
    """The bytes of a tensor that lies in a file of its own are there."""
    file = path.parent / entry.get("location", "")
    if not file.is_file():
        raise ArtifactError(f"'{path}': its external data '{file.name}' (tensor {name}) is missing", "put it beside it")
    end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
    size = file.stat().st_size
    if size < end:
        raise ArtifactError(
            f"'{path}': its external data '{file.name}' has {size} bytes and tensor {name} ends at {end}", AGAIN
        )


@dataclass(frozen=True)
class Network:
    """A parsed network. TensorRT's objects live as long as this one: parser and network refer to each other."""

    network: Any
    parser: Any
    inputs: Mapping[str, tuple[int, ...]]  # -1 where a size varies
    outputs: tuple[str, ...]
    strongly_typed: bool


def parse(path: Path, found: Library, on_cpu: bool, strongly_typed: bool) -> Network:
    """Parses the file from its path, so that external data is found.

    Raises:
        ArtifactError: see `check_file`.
        ExportError: TensorRT's parser does not take it; with the parser's words and the node.
    """
    check_file(path)
    flags = found.explicit_batch | (found.strongly_typed if strongly_typed else 0)
    network = builder(on_cpu).create_network(flags)
    parser = found.module.OnnxParser(network, found.logger)
    with found.recording() as log:
        if not parser.parse_from_file(str(path)):
            raise ExportError(f"{found.name}'s parser: {_parser_error(parser, log.errors())}", "report the graph")
    if not network.num_outputs:
        raise ArtifactError(f"'{path}' gave a network without outputs", AGAIN)
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    return Network(
        network,
        parser,
        {i.name: tuple(i.shape) for i in inputs},
        tuple(network.get_output(i).name for i in range(network.num_outputs)),
        bool(found.strongly_typed) and strongly_typed,
    )


def _parser_error(parser: Any, logged: Sequence[str]) -> str:
    """The parser's first error, read while it lives: its words, and the node."""
    if not parser.num_errors:
        return logged[0] if logged else "no words"
    error = parser.get_error(0)
    node = str(error.node_name()) if hasattr(error, "node_name") else ""
    operator = str(error.node_operator()) if hasattr(error, "node_operator") else ""
    where = f" (node {node}{', operator ' + operator if operator else ''})" if node or operator else ""
    return clean(str(error.desc())) + where


def profiles_of(spec: ExportSpec, network: Network) -> list[Bounds]:
    """Bounds of every input for each optimization profile; none where every size of the network is fixed.

    Raises:
        BadRequest: the network lacks an input of the model, or a profile varies a size that the network fixes.
    """
    missing = next((i.name for i in spec.model.inputs if i.name not in network.inputs), None)
    if missing is not None:
        raise BadRequest(
            f"the network has no input '{missing}' (it has {', '.join(network.inputs)})", "correct the model's inputs"
        )
    if not any(-1 in shape for shape in network.inputs.values()):
        return []
    found: list[Bounds] = []
    for profile in profile_shapes(spec):
        bounds: dict[str, Any] = {}
        for entry in spec.model.inputs:
            shapes = [spec.model.shape(entry, batch, (height, width)) for batch, height, width in profile]
            for axis, size in enumerate(network.inputs[entry.name]):
                given = next((s[axis] for s in shapes if size not in (-1, s[axis])), None)
                if given is not None:
                    raise BadRequest(
                        f"a profile gives input '{entry.name}' the size {given} at axis {axis}, which is {size} in the "
                        "network",
                        "add --dynamic, or leave the profile out",
                    )
            bounds[entry.name] = tuple(shapes)
        found.append(bounds)
    return found


def profile_shapes(spec: ExportSpec) -> Profiles:
    """(min, opt, max) of (batch, height, width): those that were asked for, or the contract's."""
    if spec.profiles:
        return spec.profiles
    h, w = spec.imgsz
    best: Shape = (spec.batch, h, w)
    if spec.dynamic:
        small = spec.model.stride if spec.model.has_images else 0
        return (((1, small, small), best, (spec.batch, 2 * h, 2 * w)),)
    return (((1, h, w), best, best),) if spec.batch > 1 else ()


def precision_of(network: Network) -> dict[str, str]:
    """Convolutions and matrix products by name, with the type they compute in: what the graph binds the builder to."""
    made_by: dict[str, Any] = {}
    kinds: dict[str, str] = {}
    for number in range(network.network.num_layers):
        layer = network.network.get_layer(number)
        for slot in range(layer.num_outputs):
            made_by[layer.get_output(slot).name] = layer
        if _word(layer.type) in HEAVY:
            kinds[layer.name] = _type_of(layer.get_input(0), made_by)
    return kinds


def show(found: Library, network: Network, names: Mapping[str, str]) -> None:
    """Makes tensors outputs as well, as FP32 under another name: name in the file -> name of the output.

    Those that the network does not have, since they were joined with others, are left out.
    """
    made: dict[str, Any] = {}
    for number in range(network.network.num_layers):
        layer = network.network.get_layer(number)
        made.update((t.name, t) for t in map(layer.get_output, range(layer.num_outputs)))
    for name, shown in names.items():
        if name in made:
            cast = network.network.add_cast(made[name], found.module.DataType.FLOAT)
            cast.name = shown
            cast.get_output(0).name = shown
            network.network.mark_output(cast.get_output(0))


def unquantized(network: Network) -> list[str]:
    """Transposed convolutions and products of two computed tensors, which explicit quantization leaves alone."""
    made_by: dict[str, Any] = {}
    found: list[str] = []
    for number in range(network.network.num_layers):
        layer = network.network.get_layer(number)
        for slot in range(layer.num_outputs):
            made_by[layer.get_output(slot).name] = layer
        kind = _word(layer.type)
        product = kind == "MATRIX_MULTIPLY" and not any(_is_stored(layer.get_input(i), made_by) for i in (0, 1))
        if kind == "DECONVOLUTION" or product:
            found.append(layer.name)
    return found


def _is_stored(tensor: Any, made_by: Mapping[str, Any]) -> bool:
    """Whether a tensor is a constant, maybe behind a DequantizeLinear and what the parser puts between."""
    maker = made_by.get(tensor.name)
    while maker is not None and _word(maker.type) in ("SHUFFLE", "CAST", "DEQUANTIZE", "QUANTIZE"):
        maker = made_by.get(maker.get_input(0).name)
    return maker is not None and _word(maker.type) == "CONSTANT"


def _type_of(tensor: Any, made_by: Mapping[str, Any]) -> str:
    """A tensor's type; that of the quantized values where it was just dequantized."""
    maker = made_by.get(tensor.name)
    while maker is not None and _word(maker.type) in ("SHUFFLE", "CAST"):  # reshapes that the parser puts between
        source = maker.get_input(0)
        maker = made_by.get(source.name)
    if maker is not None and _word(maker.type) == "DEQUANTIZE":
        tensor = maker.get_input(0)
    return TYPES.get(_word(tensor.dtype), _word(tensor.dtype).lower())


def _word(value: Any) -> str:
    """The bare name of an enum's member: "DataType.HALF" and "HALF: 1" are HALF."""
    return str(value).rpartition(".")[2].split(":")[0].strip()
