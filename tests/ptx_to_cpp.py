"""Rewrites inline PTX in CUDA C++ as calls of what cuda_emulator.h defines."""

import re

TYPES = {"f16": "F16", "bf16": "BF16", "tf32": "TF32"}


def translate_assembly(source):
    """Returns the source with every asm statement replaced by a block of C++."""
    parts, end = [], 0
    for match in re.finditer(r"\b(?:asm|__asm__)\s*(?:volatile|__volatile__)?\s*\(", source):
        if match.start() < end:
            continue
        stop = find_closing(source, match.end())
        parts += [source[end : match.start()], translate_statement(source[match.end() : stop])]
        end = stop + 1
    return "".join(parts) + source[end:]


def find_closing(text, position):
    """Returns where the bracket closes that was opened just before `position`; strings are skipped."""
    depth, in_string = 1, False
    while True:
        character = text[position]
        if in_string:
            position += character == "\\"
            in_string = character != '"'
        elif character == '"':
            in_string = True
        else:
            depth += (character in "([{") - (character in ")]}")
            if not depth:
                return position
        position += 1


def split(text, separator):
    """Returns the parts of a text between separators that stand in no brackets and no strings."""
    parts, start, position = [], 0, 0
    while position < len(text):
        character = text[position]
        if character == '"':
            position = re.compile(r'"(?:[^"\\]|\\.)*"').match(text, position).end()
            continue
        if character in "([{":
            position = find_closing(text, position + 1)
        elif character == separator:
            parts.append(text[start:position].strip())
            start = position + 1
        position += 1
    return [part for part in (*parts, text[start:].strip()) if part or separator == ":"]


def translate_statement(statement):
    """Returns a block of C++ for what stands in the brackets of an asm statement."""
    template, outputs, inputs, *_ = (*split(statement, ":"), "", "")
    lines = []
    types = {"r": "uint32_t", "l": "uint64_t", "h": "uint16_t", "n": "uint32_t"}
    for i, operand in enumerate(split(outputs, ",") + split(inputs, ",")):
        constraint, expression = re.fullmatch(r'"([=+]?\w)"\s*\((.*)\)', operand, re.DOTALL).groups()
        if constraint[0] in "=+":
            lines.append(f"auto& o{i} = {expression};")
        elif constraint in types:
            lines.append(f"const {types[constraint]} o{i} = ({types[constraint]})({expression});")
        else:
            lines.append(f"const auto o{i} = {expression};")
    ptx = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', template))
    ptx = re.sub(r"//.*?(?:\\n|$)", "", ptx).replace("\\n", " ").replace("\\t", " ")
    ptx = re.sub(r"%(\d+)", r"o\1", ptx).replace("%%", "")
    block = "".join(translate_instruction(instruction) + "\n" for instruction in split_instructions(ptx))
    return "{\n" + "\n".join(lines) + "\n" + block + "}"


def split_instructions(ptx):
    """Returns the instructions and labels of PTX text, in order; the braces of a scope are dropped."""
    text = ptx.strip()
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    pieces = []
    for piece in text.split(";"):
        while match := re.match(r"\s*(\w+):(?!:)", piece):
            pieces.append(f"{match[1]}:")
            piece = piece[match.end() :]
        pieces.append(piece.strip())
    return [piece for piece in pieces if piece]


def translate_instruction(instruction):
    """Returns a statement of C++ for one PTX instruction, declaration or label."""
    if instruction.endswith(":"):
        return instruction + ";"
    if match := re.match(r"\.reg\s+\.(\w+)\s+(.*)", instruction):
        c_type = {"pred": "bool", "b32": "uint32_t", "u32": "uint32_t", "s32": "int32_t", "b64": "uint64_t"}.get(
            match[1], "uint32_t"
        )
        return f"{c_type} {match[2]};"
    predicate, opcode, rest = re.fullmatch(r"(@!?\w+\s+)?([\w.:]+)\s*(.*)", instruction, re.DOTALL).groups()
    operands = [translate_operand(operand) for operand in split(rest, ",")]
    for pattern, translate in INSTRUCTIONS.items():
        if match := re.fullmatch(pattern, opcode):
            call = translate(match, *operands)
            break
    else:
        raise ValueError(f"PTX that the emulator does not know: {instruction}")
    condition = predicate and predicate.strip()[1:]
    return f"if ({condition}) {{ {call}; }}" if condition else f"{call};"


def translate_operand(operand):
    """Returns the C++ of an operand: a list of strings for {a, b}, else a string; addresses lose their brackets."""
    if operand.startswith("{"):
        return [translate_operand(part) for part in split(operand[1:-1], ",")]
    if operand.startswith("["):
        parts = split(operand[1:-1], ",")
        return [translate_operand(part) for part in parts] if len(parts) > 1 else f"({parts[0]})"
    return operand


def listed(operands):
    """Returns a C++ initializer list of operands: of one, or of those in a list."""
    return "{" + ", ".join(operands if isinstance(operands, list) else [operands]) + "}"


def references(operands, c_type):
    """Returns a C++ initializer list of pointers to operands."""
    return "{" + ", ".join(f"({c_type}*)&{operand}" for operand in operands) + "}"


def translate_copy(match, to, source, size, valid="", *_):
    return f"emulator::cp_async({to}, {source}, {size}, {valid or size})"


def translate_ldmatrix(match, registers, address):
    registers = registers if isinstance(registers, list) else [registers]
    return f"emulator::ldmatrix({'true' if match[2] else 'false'}, {address}, {references(registers, 'uint32_t')})"


def translate_mma(match, d, a, b, c):
    lists = ", ".join(
        [
            references(d, "float"),
            listed(a),
            listed(b if isinstance(b, list) else [b]),
            listed([f"(float){x}" for x in c]),
        ]
    )
    return f"emulator::mma(emulator::{TYPES[match[2]]}, {match[1]}, {lists})"


def translate_wgmma(match, d, a, b, scale_d, *signs):
    a_in_registers = isinstance(a, list)
    signs = [*signs, "0", "0"] if match[2] == "tf32" else list(signs)
    if a_in_registers:  # only B may be transposed
        signs.insert(2, "0")
    fragments, descriptor = (listed(a), "0") if a_in_registers else ("{}", a)
    return (
        f"emulator::wgmma(emulator::{TYPES[match[2]]}, {match[1]}, {references(d, 'float')}, {fragments}, "
        f"{descriptor}, {b}, {scale_d}, {', '.join(signs)})"
    )


def translate_setp(match, to, left, right):
    sign = {"ne": "!=", "eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}[match[1]]
    c_type = "int32_t" if match[2] == "s32" else "uint32_t"
    return f"{to} = ({c_type}){left} {sign} ({c_type}){right}"


def translate_load(match, registers, address):
    registers = registers if isinstance(registers, list) else [registers]
    bytes_each = int(match[3]) // 8
    at = {"shared": "emulator::at", "shared::cluster": "emulator::at_any_block"}.get(match[1])
    source = f"{at}({address}, {bytes_each * len(registers)})" if at else f"(void*){address}"
    copies = " ".join(f"memcpy(&{r}, (char*)from + {i * bytes_each}, {bytes_each});" for i, r in enumerate(registers))
    return f"{{ void* from = {source}; {copies} }}"


def translate_store(match, address, values):
    values = values if isinstance(values, list) else [values]
    bytes_each = int(match[3]) // 8
    target = f"emulator::at({address}, {bytes_each * len(values)})" if match[1] == "shared" else f"(void*){address}"
    copies = " ".join(
        f"{{ auto value = {v}; uint{8 * bytes_each}_t raw; memcpy(&raw, &value, {bytes_each}); "
        f"memcpy((char*)to + {i * bytes_each}, &raw, {bytes_each}); }}".replace(
            "auto value = 0;", "uint64_t value = 0;"
        )
        for i, v in enumerate(values)
    )
    return f"{{ void* to = {target}; {copies} }}"


PACKING = {"f16": "__floats2half2_rn", "bf16": "__floats2bfloat162_rn"}

# Patterns of opcodes and what writes the C++ of such an instruction from its operands.
INSTRUCTIONS = {
    r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::\w+)?": translate_copy,
    r"cp\.async\.commit_group": lambda _: "emulator::cp_async_commit()",
    r"cp\.async\.wait_group": lambda _, groups: f"emulator::cp_async_wait({groups})",
    r"cp\.async\.wait_all": lambda _: "emulator::cp_async_commit(); emulator::cp_async_wait(0)",
    r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16": translate_ldmatrix,
    r"stmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16": lambda match, address, registers: (
        f"emulator::stmatrix({'true' if match[2] else 'false'}, {address}, {listed(registers)})"
    ),
    r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(f16|bf16|tf32)\.\2\.f32": translate_mma,
    r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k(\d+)\.f32\.(f16|bf16|tf32)\.\2": translate_wgmma,
    r"wgmma\.fence\.sync\.aligned|fence\.\S+|griddepcontrol\.\w+|setmaxnreg\.\S+|prefetch\.\S+": lambda _, *args: "",
    r"wgmma\.commit_group\.sync\.aligned": lambda _: "emulator::wgmma_commit()",
    r"wgmma\.wait_group\.sync\.aligned": lambda _, groups: f"emulator::wgmma_wait({groups})",
    r"mbarrier\.init\.shared(?:::cta)?\.b64": lambda _, address, count: f"emulator::mbarrier_init({address}, {count})",
    r"mbarrier\.arrive(?:\.release\.cta)?\.shared(?:::cta)?\.b64": lambda _, state, address, *count: (
        f"emulator::mbarrier_arrive({address})"
    ),
    r"mbarrier\.arrive\.expect_tx(?:\.release\.cta)?\.shared(?:::cta)?\.b64": lambda _, state, address, size: (
        f"emulator::mbarrier_arrive({address}, {size})"
    ),
    r"mbarrier\.expect_tx(?:\.relaxed\.cta)?\.shared(?:::cta)?\.b64": lambda _, address, size: (
        f"emulator::mbarrier_expect({address}, {size})"
    ),
    r"mbarrier\.(?:try|test)_wait\.parity(?:\.acquire\.cta)?\.shared(?:::cta)?\.b64": (
        lambda _, to, address, parity, *hint: f"{to} = emulator::mbarrier_try_wait({address}, {parity})"
    ),
    r"cp\.async\.bulk\.shared(?:::\w+)?\.global\.mbarrier::complete_tx::bytes": lambda _, to, source, size, barrier: (
        f"emulator::cp_async_bulk({to}, {source}, {size}, {barrier})"
    ),
    r"cp\.async\.bulk\.tensor\.\dd\.shared(?:::\w+)?\.global(?:\.tile)?\.mbarrier::complete_tx::bytes": (
        lambda _, to, source, barrier: f"emulator::cp_async_tensor({to}, {source[0]}, {listed(source[1])}, {barrier})"
    ),
    r"(?:bar|barrier)\.(?:cta\.)?sync(?:\.aligned)?": lambda _, name, *size: (
        f"emulator::meet_named({name}, {size[0] if size else 'emulator::block_threads()'})"
    ),
    r"barrier\.cluster\.arrive(?:\.release)?\.aligned": lambda _: "",  # each wait comes at once
    r"barrier\.cluster\.wait(?:\.acquire)?\.aligned": lambda _: "emulator::meet_cluster()",
    r"mapa\.shared::cluster\.u32": lambda _, to, address, rank: f"{to} = emulator::map_to_block({address}, {rank})",
    r"setp\.(ne|eq|lt|le|gt|ge)\.([bus]\d+)": translate_setp,
    r"selp\.\w+": lambda _, to, yes, no, predicate: f"{to} = {predicate} ? {yes} : {no}",
    r"mov\.\w+": lambda _, to, source: f"{to} = {source}",
    r"bra(?:\.uni)?": lambda _, label: f"goto {label}",
    r"ld\.(shared::cluster|shared|global)(?:::cta)?((?:\.v\d)?(?:\.[a-z]\w*)*?(?:\.v\d)?)\.[bufs](\d+)": translate_load,
    r"st\.(shared|global)(?:::cta)?((?:\.v\d)?(?:\.[a-z]\w*)*?(?:\.v\d)?)\.[bufs](\d+)": translate_store,
    r"cvt\.rn\.(f16|bf16)x2\.f32": lambda match, to, high, low: (
        f"{to} = emulator::bits<uint32_t>({PACKING[match[1]]}({low}, {high}))"
    ),
    r"cvt\.rna\.tf32\.f32": lambda _, to, source: f"{to} = emulator::to_tf32({source})",
    r"ex2\.approx(?:\.ftz)?\.f32": lambda _, to, source: f"{to} = exp2f({source})",
    r"lg2\.approx(?:\.ftz)?\.f32": lambda _, to, source: f"{to} = log2f({source})",
    r"rcp\.approx(?:\.ftz)?\.f32": lambda _, to, source: f"{to} = 1.0f / {source}",
    r"tanh\.approx\.f32": lambda _, to, source: f"{to} = tanhf({source})",
    r"elect\.sync": lambda _, to, mask: f"{to.split('|')[-1]} = emulator::lane() == 0",
}
