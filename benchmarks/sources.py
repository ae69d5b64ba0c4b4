"""The kernels of `cases`, as their launchers have Triton specialise and compile them."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_lora.kernels import (
    expand,
    experts,
    gemm,
    grads,
    group,
    multi,
    persistent,
    pieces,
    skinny,
)
from fused_lora.kernels.configs import MAX_GROUP, MAX_SPLIT_K
from fused_lora.kernels.sizes import padded
from fused_lora.kernels.tile_config import is_specialized, is_tma

from .cases import Case

# Of each format of a quantised W0: its codes, its tables, and its blocks. NF4 is doubly quantised.
CODES: dict[str, tuple[str, tuple[str | None, ...], tuple[int, int]]] = {
    "nf4": ("*u8", ("*u8", "*fp32", "*fp32", "*fp32", "*fp32"), (1, 64)),
    "int8": ("*i8", ("*fp32", None, None, None, None), (1, 0)),
    "fp8": ("*fp8e4nv", ("*fp32", None, None, None, None), (128, 128)),
    "fp8 rows": ("*fp8e4nv", ("*fp32", None, None, None, None), (1, 0)),
}
FP8_ARCH = 89  # from there on there is the type, and a product in it


def _group_source(case: Case) -> ASTSource:
    """dx of as many members as a launch takes, or the adapters' part; operands are tuples."""
    kernel = group.lora_group_kernel if case.kind == "group" else group.add_group_kernel
    x, adapter = f"*{case.dtype}", f"*{case.adapter_dtype}"
    constants: dict[str, object] = {k: v for k, v in case.config.meta().items() if k.isupper()}
    constants |= {"GROUP_M": gemm.GROUP_M, "EVEN_K": True, "PRECISION": "ieee"}
    constants["BLOCK_R" if case.kind == "group" else "BLOCK_K"] = min(
        padded(case.r), case.config.BLOCK_K
    )
    contiguous = ("i32", 1)  # the strides of a row-major matrix
    types = {
        "x_ptrs": x,
        "w_ptrs": x,
        "h_ptrs": x,
        "b_ptrs": adapter,
        "seed_ptrs": "*i64" if case.dropout else None,
        "Ks": "i32",
        "Rs": "i32",
        "strides_x": contiguous,
        "strides_w": contiguous,
        "strides_b": contiguous,
        "scales": "fp32",
        "thresholds": "i32",
    }
    flat = {"y_ptr": x, "M": "i32", "N": "i32", "stride_hm": "i32"}
    values = flat | {name: (kind,) * MAX_GROUP for name, kind in types.items()} | constants
    signature, constexprs, attrs = {}, {}, {}

    def describe(name: str, path: tuple[int, ...], value: object) -> object:
        if isinstance(value, tuple):
            return tuple(describe(name, (*path, i), v) for i, v in enumerate(value))
        if name in constants or not isinstance(value, str):
            constexprs[path] = value
            return "constexpr"
        if name not in ("scales", "thresholds", "seed_ptrs"):
            attrs[path] = [["tt.divisibility", 16]]
        return value

    for index, name in enumerate(kernel.arg_names):
        signature[name] = describe(name, (index,), values[name])
    return ASTSource(kernel, signature, constexprs, attrs)


def _gemm_source(case: Case) -> tuple[Any, dict[str, Any], dict[str, object]]:
    """The kernel, its pointers and its constants, beside the tile's."""
    x, adapter = f"*{case.dtype}", f"*{case.adapter_dtype}"
    pointers: dict[str, Any] = {
        "x_ptr": x,
        "w_ptr": adapter if case.kind == "plain" else x,
        "y_ptr": x,
    }
    constants: dict[str, object] = {"stride_xk": 1, "GROUP_M": gemm.GROUP_M, "EVEN_K": True}
    constants["stride_wn" if case.transposed else "stride_wk"] = 1
    constants["BLOCK_R"] = padded(case.r)
    base_alone = case.kind == "quantized" and case.form == "multi"  # h B is added by another kernel
    if base_alone:
        pointers["bias_ptr"], constants["stride_bias"] = x, 1
    elif case.kind != "plain":
        pointers |= {"h_ptr": x, "b_ptr": adapter, "bias_ptr": x}
        constants["stride_bias"] = 1
        constants["stride_bn" if case.transposed else "stride_br"] = 1
    if case.kind == "one_pass":
        pointers["a_ptr"] = adapter
        constants["stride_ar" if case.transposed else "stride_ak"] = 1
    elif case.kind != "plain":
        constants["BLOCK_R"] = min(padded(case.r), case.config.BLOCK_K)
    if case.dropout:
        pointers["seed_ptr"] = "*i64"
    if case.form == "multi" and not base_alone:
        pointers |= MULTI_POINTERS
        constants |= {"USE_A": case.transposed, "ALIGNED": True, "RANK_DIVISOR": 16}
        constants["BLOCK_R"] = min(padded(case.r), case.config.BLOCK_K, pieces.MAX_BLOCK_R)
    if case.dora:
        pointers |= {"col_scale_ptr": "*fp32", "z_ptr": x}
    _read_codes(case, pointers, constants)
    if case.kind == "fp8":
        pointers["x_scale_ptr"] = "*fp32"
        pointers["x_ptr"] = "*fp8e4nv" if case.arch >= FP8_ARCH else "*fp16"
    return gemm.lora_gemm_kernel, pointers, constants


def _read_codes(case: Case, pointers: dict[str, Any], constants: dict[str, object]) -> None:
    """Of a quantised W0, what the kernels take in place of a tensor."""
    constants |= {"w_tables": None, "W_LAYOUT": None}
    if case.codes:
        pointers["w_ptr"], pointers["w_tables"], block = CODES[case.codes]
        del constants["w_tables"]
        constants |= {"stride_wk": 0, "stride_wn": 0}
        constants["W_LAYOUT"] = (*block, not case.transposed)  # the forward reads W0^T
        if case.arch < FP8_ARCH and pointers["w_ptr"] == "*fp8e4nv":
            pointers["w_ptr"] = "*u8"


def _grad_source(case: Case) -> tuple[Any, dict[str, str], dict[str, object]]:
    x = f"*{case.dtype}"
    if case.sums:
        names = ("partial_ptr", "partial2_ptr", "out_ptr", "out2_ptr")
        constants: dict[str, object] = {"BLOCK": grads.REDUCE_BLOCK}
        return grads.sum_partials_kernel, dict.fromkeys(names, "*fp32"), constants
    pointers = dict.fromkeys(("q_ptr", "l_ptr", "q2_ptr", "l2_ptr"), x)
    pointers |= {"out_ptr": "*fp32", "out2_ptr": "*fp32"}
    if case.dropout:
        pointers["seed_ptr"] = "*i64"
    constants = {"stride_qc": 1, "stride_or": 1, "stride_q2c": 1, "stride_o2r": 1, "EVEN_K": True}
    return grads.lora_grad_kernel, pointers, constants


def _skinny_source(case: Case) -> tuple[Any, dict[str, str], dict[str, object]]:
    x, adapter = f"*{case.dtype}", f"*{case.adapter_dtype}"
    pointers = {"partial_ptr": "*fp32"}
    if case.dropout and case.transposed == case.sums:  # on x in the parts, or on y in the sum
        pointers["seed_ptr"] = "*i64"
    if case.sums:
        pointers |= {"bias_ptr": x, "h_ptr": x, "b_ptr": adapter, "y_ptr": x}
        constants: dict[str, object] = {"stride_bias": 1, "CHUNK_R": padded(case.r)}
        constants["SPLIT_K"] = MAX_SPLIT_K
        constants |= {"BLOCK_M": case.config.BLOCK_M, "BLOCK_N": skinny.SUM_BLOCK_N}
        constants["stride_bn" if case.transposed else "stride_br"] = 1
        return skinny.skinny_sum_kernel, pointers, constants
    pointers |= {"x_ptr": x, "w_ptr": x, "a_ptr": adapter}
    constants = {"stride_xk": 1, "EVEN_K": True}
    constants["stride_wn" if case.transposed else "stride_wk"] = 1
    constants["stride_ar" if case.transposed else "stride_ak"] = 1
    return skinny.skinny_partial_kernel, pointers, constants


def _expand_source(case: Case) -> tuple[Any, dict[str, str], dict[str, object]]:
    x = f"*{case.dtype}"
    pointers = {"y_ptr": x, "h_ptr": x, "b_ptr": f"*{case.adapter_dtype}"}
    if case.dropout:
        pointers["seed_ptr"] = "*i64"
    constants: dict[str, object] = {"BLOCK_K": min(padded(case.r), case.config.BLOCK_K)}
    constants["stride_bn" if case.transposed else "stride_br"] = 1
    return expand.add_lora_kernel, pointers, constants


def _tma_source(case: Case) -> tuple[Any, dict[str, str], dict[str, object]]:
    config, forward = case.config, not case.transposed
    BLOCK_R, CHUNK_R = persistent.rank_blocks(case.r, case.dropout and case.transposed)

    def descriptor(dtype: str, rows: int, columns: int, transposed: bool = False) -> str:
        block = [columns, rows] if transposed else [rows, columns]
        return f"tensordesc<{dtype}{block}>"

    pointers = {
        "x_desc": descriptor(case.dtype, config.BLOCK_M, config.BLOCK_K),
        "w_desc": descriptor(case.dtype, config.BLOCK_K, config.BLOCK_N, forward),
        "y_desc": descriptor(case.dtype, config.BLOCK_M, config.BLOCK_N // (config.SUBTILES or 1)),
        "bias_ptr": f"*{case.dtype}",
        "h_ptr": f"*{case.dtype}",
        "b_ptr": f"*{case.adapter_dtype}",
    }
    if case.kind != "tma_second":
        pointers["a_desc"] = descriptor(case.adapter_dtype, config.BLOCK_K, BLOCK_R, forward)
    if case.kind == "tma_produced":
        pointers["sync_ptr"] = "*i32"
    if case.dropout:
        pointers["seed_ptr"] = "*i64"
    constants: dict[str, object] = {
        "stride_bias": 1,
        "stride_br" if forward else "stride_bn": 1,
        "BLOCK_R": BLOCK_R,
        "CHUNK_R": CHUNK_R,
        "ONE_CHUNK": case.r <= CHUNK_R,
        "W_TRANSPOSED": forward,
        "A_TRANSPOSED": forward,
        "DROP_X": forward,
    }
    return persistent.lora_persistent_kernel, pointers, constants


def _specialized_source(case: Case) -> tuple[Any, dict[str, str], dict[str, object]]:
    from triton.experimental.gluon import language as gl

    from fused_lora.kernels import specialized

    config, forward = case.config, not case.transposed
    dtype = gl.float16 if case.dtype == "fp16" else gl.bfloat16
    rows = config.BLOCK_M // 2 if config.COOPERATIVE else config.BLOCK_M
    BLOCK_N, BLOCK_K, SUBTILES = config.BLOCK_N, config.BLOCK_K, config.SUBTILES or 1
    width = BLOCK_N // 2 if config.HALVES else BLOCK_N

    def descriptor(rows: int, columns: int, transposed: bool = False) -> str:
        block = [columns, rows] if transposed else [rows, columns]
        layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
        return f"tensordesc<{case.dtype}{block},{layout!r}>"

    pointers = {
        "x_desc": descriptor(rows, BLOCK_K),
        "w_desc": descriptor(BLOCK_K, width, forward),
        "h_desc": descriptor(rows, BLOCK_K),
        "b_desc": descriptor(BLOCK_K, width, forward),
        "y_desc": descriptor(rows, BLOCK_N // SUBTILES),
        "bias_ptr": f"*{case.dtype}",
    }
    if case.kind == "ws_group":  # of as many members as a launch takes
        pointers |= {f"{name}{i}_desc": pointers[f"{name}_desc"] for name in "xw" for i in (2, 3)}
    if case.dora:
        pointers |= {"z_desc": pointers["y_desc"], "col_scale_ptr": "*fp32"}
    if case.kind == "ws_produced":
        pointers["a_desc"] = descriptor(BLOCK_K, BLOCK_K, forward)
        pointers |= {"h_ptr": f"*{case.dtype}", "sync_ptr": "*i32"}
    constants: dict[str, object] = {
        "stride_bias": 1,
        "DEPTH_R": min(padded(case.r), BLOCK_K),
        "STAGES": config.num_stages,
        "HALVES": bool(config.HALVES),
        "W_TRANSPOSED": forward,
    }
    return specialized.lora_specialized_kernel, pointers, constants


_UNSPECIALISED = ("scale", "keep_scale", "threshold", "halved", "num_pieces")


MULTI_POINTERS = {
    "order_ptr": "*i32",
    "pieces_ptr": "*i32",
    "tile_first_ptr": "*i32",
    "table_ptr": "*i64",
    "scalings_ptr": "*fp32",
}


# Of load_adapter, where adapters are found by a table and where they are a stack.
TABLE: dict[str, object] = {"ALIGNED": True, "RANK_DIVISOR": 16}
STACK: dict[str, object] = {"ALIGNED": False, "RANK_DIVISOR": 1}
FAN = 8  # experts of a token


def _multi_source(case: Case) -> tuple[Any, dict[str, str], dict[str, object]]:
    x, stacked = f"*{case.dtype}", case.form == "experts"
    pointers = MULTI_POINTERS | {"w_ptr": f"*{case.adapter_dtype}"}
    if stacked:
        del pointers["table_ptr"], pointers["scalings_ptr"]
    if case.dropout:
        pointers["seed_ptr"] = "*i64"
    constants: dict[str, object] = {"USE_A": not case.transposed}
    if case.kind != "expand":
        constants["FAN"] = FAN if stacked else 1
    if case.kind == "multi_grad":
        pointers |= {"q_ptr": x, "l_ptr": x, "out_ptr": "*fp32"}
        return multi.multi_grad_kernel, pointers, constants | {"stride_qc": 1}
    constants |= STACK if stacked else TABLE
    if case.kind == "plain":
        pointers |= {"x_ptr": x, "h_ptr": x if stacked else "*fp32"}
        return multi.shrink_kernel, pointers, constants | {"stride_xk": 1, "EVEN_K": True}
    pointers |= {"h_ptr": "*fp32", "y_ptr": x, "h_sum_ptr": x}
    constants["BLOCK_K"] = min(padded(case.r), case.config.BLOCK_K)
    return multi.expand_kernel, pointers, constants


def _experts_source(case: Case) -> tuple[Any, dict[str, str], dict[str, object]]:
    x = f"*{case.dtype}"
    orders = dict.fromkeys(("order_x_ptr", "order_y_ptr", "pieces_ptr"), "*i32")
    pointers = orders | dict.fromkeys(("x_ptr", "w_ptr", "h_ptr", "y_ptr", "bias_ptr"), x)
    pointers["b_ptr"] = f"*{case.adapter_dtype}"
    if case.dropout:
        pointers["seed_ptr"] = "*i64"
    constants: dict[str, object] = {"stride_xk": 1, "stride_bias": 1, "EVEN_K": True}
    constants["stride_wn" if case.transposed else "stride_wk"] = 1
    constants |= {"FAN": FAN, "FAN_Y": FAN, "USE_A": case.transposed}
    constants |= {"BLOCK_R": pieces.MAX_BLOCK_R, "GROUP_M": gemm.GROUP_M}
    _read_codes(case, pointers, constants)
    return experts.experts_kernel, pointers, constants


def source(case: Case) -> ASTSource:
    """The case's kernel with contiguous rows, as the launcher specialises it."""
    if case.kind in ("group", "expand_group"):
        return _group_source(case)
    if is_tma(case.kind):
        build = _tma_source
    elif is_specialized(case.kind):
        build = _specialized_source
    elif case.form == "experts" and case.kind in ("second", "quantized"):
        build = _experts_source
    elif case.form != "layer" and case.kind not in ("second", "quantized"):
        build = _multi_source
    else:
        special = {"grad": _grad_source, "skinny": _skinny_source, "expand": _expand_source}
        build = special.get(case.kind, _gemm_source)
    kernel, pointers, constants = build(case)
    names = kernel.arg_names
    tile: dict[str, object] = {k: v for k, v in case.config.meta().items() if k in names}
    if "PRECISION" in names:
        tile["PRECISION"] = "ieee"
    return specialised(kernel, pointers, {**tile, **constants})


def specialised(kernel: Any, pointers: dict[str, Any], constants: dict[str, object]) -> ASTSource:
    """A kernel as the launcher specialises it: everything aligned, absent pointers constants."""
    names = kernel.arg_names
    constants = dict(constants)
    signature: dict[str, object] = {}
    attrs: dict[tuple[int, ...], object] = {}
    indexed: dict[tuple[int, ...], object] = {}
    for index, name in enumerate(names):
        # None (no such operand) and 1 (contiguous) are specialised by the launcher: constants here.
        if name.endswith(("_ptr", "_desc")) and name not in pointers:
            constants[name] = None
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind = pointers.get(name, "fp32" if name.endswith("scale") else "i32")
        if isinstance(kind, tuple):  # of pointers, some of them absent
            signature[name] = tuple(part or "constexpr" for part in kind)
            indexed |= {(index, i): None for i, part in enumerate(kind) if part is None}
            attrs |= {(index, i): [["tt.divisibility", 16]] for i, p in enumerate(kind) if p}
            continue
        signature[name] = kind
        if name not in _UNSPECIALISED and not name.endswith("_desc"):
            attrs[(index,)] = [["tt.divisibility", 16]]
    indexed |= {(names.index(name),): value for name, value in constants.items()}
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(kernel, signature, indexed, attrs)
    return ASTSource(kernel, signature, indexed, attrs)


def compiled(case: Case) -> Any:
    """The case's kernel, compiled for its architecture."""
    options = {k: v for k, v in case.config.meta().items() if not k.isupper()}
    if case.sums:
        options["num_warps"] = 4
    if is_specialized(case.kind):
        from fused_lora.kernels.specialized import MAX_REGISTERS

        options["maxnreg"] = MAX_REGISTERS
    return triton.compile(source(case), target=GPUTarget("cuda", case.arch, 32), options=options)
