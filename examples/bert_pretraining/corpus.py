"""Text to documents, sentences and a WordPiece tokenizer; knows nothing of examples or models.

A document is a list of sentences. Which documents are held out is decided by a hash of their
text, so that neither the order of the files nor added documents move any across the split.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from errors import UserError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

Document = list[str]

# Folders below the standard library that are not part of it, or that installations leave out.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter"}

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MAX_ALPHABET = 1000

BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
_SENTENCE_END = re.compile(r"""[.!?]["')\]*]*$""")
# A full stop ends a sentence when what follows looks like the start of one.
_BOUNDARY = re.compile(r"""(?<=[.!?])(["')\]*]*)\s+(?=["'(\[*]*[A-Z])""")
_ABBREVIATION = re.compile(r"(?:\b[A-Z]|\be\.g|\bi\.e|\bcf|\betc|\bvs|\bMr|\bMrs|\bDr|\bSt)\.$")
_HEADING_RULE = re.compile(r"^\s*([*=\-~^#\"])\1{2,}\s*$")


def split_sentences(block: str) -> Document:
    """Splits a block of text without blank lines into sentences.

    A line that ends like a sentence ends one; other line ends are taken as wrapping. A block of
    several lines without any sentence end (code, a table, a word list) gives its lines.
    """
    lines = [" ".join(line.split()) for line in block.splitlines() if line.strip()]
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        paragraphs[-1].append(line)
        if _SENTENCE_END.search(line):
            paragraphs.append([])
    sentences = [s for p in paragraphs if p for s in _split_paragraph(" ".join(p))]
    if len(sentences) == 1 and len(lines) > 1 and not _SENTENCE_END.search(lines[-1]):
        return lines
    return sentences


def _split_paragraph(text: str) -> list[str]:
    sentences, start = [], 0
    for boundary in _BOUNDARY.finditer(text):
        candidate = text[start : boundary.end(1)]
        if _ABBREVIATION.search(candidate):
            continue
        sentences.append(candidate)
        start = boundary.end()
    sentences.append(text[start:])
    return sentences


def python_documents() -> list[Document]:
    """The default corpus: the language reference that every CPython carries, a topic a document.

    Topics quote one another at length. A paragraph is kept only in the longest topic that has
    it, or else held-out text would also be training text.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for _, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        document: Document = []
        for block in BLANK_LINES.split(text):
            lines = [line for line in block.splitlines() if not _HEADING_RULE.match(line)]
            key = " ".join(" ".join(lines).split())
            if key and key not in seen:
                seen.add(key)
                document += split_sentences("\n".join(lines))
        documents.append(document)
    return documents


def docstring_documents() -> list[Document]:
    """The docstrings of the standard library, a module a document; sources are parsed, not run.

    Docstrings repeat one another: a paragraph is kept where it comes first.
    """
    library = Path(sysconfig.get_path("stdlib"))
    places = [(path.relative_to(library), path) for path in library.rglob("*.py")]
    seen: set[str] = set()
    documents = []
    for relative, path in sorted(places):
        if not _NOT_LIBRARY.isdisjoint(relative.parts):
            continue
        document: Document = []
        for docstring in _docstrings(path.read_bytes()):
            for block in BLANK_LINES.split(docstring):
                key = " ".join(block.split())
                if key and key not in seen:
                    seen.add(key)
                    document += split_sentences(block)
        documents.append(document)
    return documents


def _docstrings(source: bytes) -> list[str]:
    """Docstrings in the order of the source; none of what is no Python of this version."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [docstring for node in nodes if (docstring := ast.get_docstring(node))]


def corpus_files(patterns: Sequence[str]) -> list[Path]:
    """Expands files, folders (every file below that is not hidden) and globs; sorted, unique."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            below = (p for p in path.rglob("*") if p.is_file())
            found = [p for p in below if not _hidden(p.relative_to(path))]
        elif path.is_file():
            found = [path]
        else:
            found = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
        if not found:
            raise UserError(f"--corpus: no file found at {pattern}.")
        files.update((p.resolve(), None) for p in sorted(found))
    return list(files)


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document is among the `share` of all that is held out."""
    digest = hashlib.sha256("\n".join(document).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """Trains an uncased BERT WordPiece tokenizer; the same text always gives the same tokenizer.

    Args:
        documents: Training documents.
        vocab_size: Upper bound of the vocabulary, special tokens included.
    """
    sentences = [sentence for document in documents for sentence in document]
    tokenizer = _bert_tokenizer(models.WordPiece(unk_token="[UNK]"))
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(tokenizer.normalizer.normalize_str(sentence))
    frequent = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    alphabet = sorted(frequent[:MAX_ALPHABET])
    # The trainer numbers "##x" pieces in hash-map order and breaks ties by number. Numbering
    # them beforehand, as if they were special tokens, makes its result reproducible.
    pieces = SPECIAL_TOKENS + alphabet + [f"##{c}" for c in alphabet]
    if vocab_size < len(pieces):
        raise UserError(
            f"--vocab-size: {vocab_size} is too small, the characters of this corpus alone "
            f"need {len(pieces)}."
        )
    tokenizer.train_from_iterator(
        sentences,
        trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=pieces,
            limit_alphabet=len(alphabet),
            show_progress=False,
        ),
        length=len(sentences),
    )
    vocab = tokenizer.get_vocab()
    # A fresh tokenizer, in which the pieces are ordinary vocabulary.
    trained = _bert_tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    trained.add_special_tokens(SPECIAL_TOKENS)
    return trained


def _bert_tokenizer(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer
