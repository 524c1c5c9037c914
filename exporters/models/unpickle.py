"""Reads the pickle of a torch.save archive into inert objects; nothing of the file is ever executed.

This is a machine of its own for the few opcodes that torch.save writes, not a subclass of `pickle.Unpickler`. That one
calls `__setstate__`, `append`, `extend` and `__setitem__` of what it has built, reserves memory for any memo index that
the file names, and hashes tuples nested as deep as the file likes. Here a name of the file is looked up in an exact
table, and the result is a `Stub`, a `Tensor` or a plain container that this module made itself.
"""

from __future__ import annotations

import struct
from typing import Any, cast

from exporters.models.names import resolved, unknown_layers
from exporters.models.refusal import AGAIN, STATE_ONLY, RefusalError, shown
from exporters.models.stand_ins import Name, Stub, as_dict, as_list, as_tuple, instance, keys, of, set_items
from exporters.models.tensors import storage_of

# The largest pickle seen (YOLOv9t) has 0.34 MB. The caps keep what a hostile file can claim under about 1 GB of memory:
# each byte of a pickle can make an object of some 60 bytes, each container one of some 200.
MAX_PICKLE = 8 * 2**20
MAX_OBJECTS = 2**20


def unpickle(data: bytes) -> Any:
    """The pickle's root: None, bool, int, float, str, bytes, list, tuple, dict, set, Tensor, Storage, Name or Stub.

    Args:
        data: the whole pickle, of at most MAX_PICKLE bytes.

    Raises:
        RefusalError: unsafe, when the pickle names or calls something that is not in the table; otherwise it is
            damaged, has too many objects, or has layers that are not known (the family of the model is named).
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    unknown: dict[str, Name] = {}
    end, position, made = len(data), 0, 0

    def take(start: int, size: int) -> bytes:
        if start + size > end:
            raise ValueError("the pickle ends early")
        return data[start : start + size]

    def popped() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    try:
        while True:
            op = data[position]
            position += 1
            # In the order of how often torch.save writes them: this chain is the reader's inner loop.
            if op == 0x68:  # BINGET
                stack.append(memo[data[position]])
                position += 1
            elif op == 0x72:  # LONG_BINPUT
                memo[int.from_bytes(take(position, 4), "little")] = stack[-1]
                position += 4
            elif op == 0x52:  # REDUCE
                arguments = stack.pop()
                stack[-1] = _called(stack[-1], arguments)
                made += 1
            elif op == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif op == 0x4B:  # BININT1
                stack.append(data[position])
                position += 1
            elif op == 0x28:  # MARK
                marks.append(len(stack))
            elif op == 0x7D:  # EMPTY_DICT
                stack.append({})
                made += 1
            elif op == 0x74:  # TUPLE
                stack.append(tuple(popped()))
            elif op == 0x89:  # NEWFALSE
                stack.append(False)
            elif op == 0x58:  # BINUNICODE
                size = int.from_bytes(take(position, 4), "little")
                stack.append(take(position + 4, size).decode())
                position += 4 + size
            elif op == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif op == 0x75:  # SETITEMS
                items = popped()
                set_items(stack[-1], items)
            elif op == 0x51:  # BINPERSID
                stack[-1] = storage_of(stack[-1])
                made += 1
            elif op == 0x4E:  # NONE
                stack.append(None)
            elif op == 0x86:  # TUPLE2
                second = stack.pop()
                stack[-1] = (stack[-1], second)
            elif op == 0x87:  # TUPLE3
                third, second = stack.pop(), stack.pop()
                stack[-1] = (stack[-1], second, third)
            elif op == 0x5D:  # EMPTY_LIST
                stack.append([])
                made += 1
            elif op == 0x47:  # BINFLOAT
                stack.append(struct.unpack(">d", take(position, 8))[0])
                position += 8
            elif op == 0x71:  # BINPUT
                memo[data[position]] = stack[-1]
                position += 1
            elif op == 0x81:  # NEWOBJ
                stack.pop()
                stack[-1] = instance(stack[-1])
                made += 1
            elif op == 0x62:  # BUILD
                state = stack.pop()
                _build(stack[-1], state)
            elif op == 0x4D:  # BININT2
                stack.append(int.from_bytes(take(position, 2), "little"))
                position += 2
            elif op == 0x88:  # NEWTRUE
                stack.append(True)
            elif op == 0x6A:  # LONG_BINGET
                stack.append(memo[int.from_bytes(take(position, 4), "little")])
                position += 4
            elif op == 0x4A:  # BININT
                stack.append(int.from_bytes(take(position, 4), "little", signed=True))
                position += 4
            elif op == 0x73:  # SETITEM
                value, key = stack.pop(), stack.pop()
                set_items(stack[-1], (key, value))
            elif op == 0x65:  # APPENDS
                items = popped()
                as_list(stack[-1]).extend(items)
            elif op == 0x61:  # APPEND
                value = stack.pop()
                as_list(stack[-1]).append(value)
            elif op == 0x63:  # GLOBAL
                middle = data.index(b"\n", position)
                last = data.index(b"\n", middle + 1)
                stack.append(resolved(data[position:middle].decode(), data[middle + 1 : last].decode(), unknown))
                position = last + 1
            elif op == 0x93:  # STACK_GLOBAL
                name, module = of(stack.pop(), str), of(stack.pop(), str)
                stack.append(resolved(module, name, unknown))
            elif op == 0x94:  # MEMOIZE
                memo[len(memo)] = stack[-1]
                made += 1
            elif op == 0x8C:  # SHORT_BINUNICODE
                stack.append(take(position + 1, data[position]).decode())
                position += 1 + data[position]
            elif op == 0x8A:  # LONG1
                stack.append(int.from_bytes(take(position + 1, data[position]), "little", signed=True))
                position += 1 + data[position]
            elif op == 0x43:  # SHORT_BINBYTES
                stack.append(take(position + 1, data[position]))
                position += 1 + data[position]
            elif op == 0x8F:  # EMPTY_SET
                stack.append(set())
                made += 1
            elif op == 0x90:  # ADDITEMS
                items = popped()
                cast("set[Any]", of(stack[-1], set)).update(keys(items))
            elif op == 0x95:  # FRAME
                position += 8
            elif op == 0x80:  # PROTO
                if data[position] > 5:
                    raise ValueError(f"protocol {data[position]}")
                position += 1
            elif op == 0x2E:  # STOP
                root = stack.pop()
                break
            else:
                raise _opcode_refused(op)
            if made > MAX_OBJECTS:
                raise RefusalError(f"has a data.pkl of more than {MAX_OBJECTS} objects", STATE_ONLY)
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
        reason = "it refers to what it has not stored" if isinstance(error, KeyError) else shown(str(error))
        raise RefusalError(f"is damaged: its data.pkl cannot be read past byte {position} ({reason})", AGAIN) from error
    if unknown:
        raise unknown_layers(unknown)
    return root


# Opcodes that call code by name, or by a number or text that a program registered.
_CALLING = {
    0x69: "INST", 0x6F: "OBJ", 0x92: "NEWOBJ_EX", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x50: "PERSID"
}  # fmt: skip


def _opcode_refused(op: int) -> RefusalError:
    if op in _CALLING:
        what = f"uses the pickle opcode {_CALLING[op]}, which torch.save never writes and which can call any code"
        return RefusalError(what, f"do not load this file; {STATE_ONLY}", unsafe=True)
    return RefusalError(f"is damaged, or not written by torch.save: its data.pkl has the opcode {op:#04x}", AGAIN)


def _called(callee: Any, arguments: Any) -> Any:
    name = of(callee, Name)
    return name.make(as_tuple(arguments)) if name.make is not None else instance(name)


def _build(target: Any, state: Any) -> None:
    if type(target) is Stub:
        # Objects with slots give (dict or None, dict of the slots); other states (numpy's dtype) are not needed.
        parts = as_tuple(state) if type(state) is tuple else (state,)
        target.attrs = {key: value for part in parts if type(part) is dict for key, value in as_dict(part).items()}
    else:
        # A state dict's own attributes, `_metadata`: versions of modules, which have no values.
        as_dict(target)
