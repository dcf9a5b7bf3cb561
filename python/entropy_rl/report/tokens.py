"""The texts of single tokens."""

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text that a token adds after another token, or its bytes in hexadecimal if it is a part of a character."""
    before = tokenizer.decode([token])
    text = tokenizer.decode([token, token])
    # A token may lose its leading space when it is decoded alone, but not after another token.
    text = text[len(before) :] if text.startswith(before) else before
    if REPLACEMENT in text:
        return f"⟨{_hexadecimal(tokenizer.convert_ids_to_tokens(token))}⟩"
    return text


def _hexadecimal(token: str) -> str:
    """The bytes of a token like <0xE4> or of byte-level BPE, which has a printable character for each byte."""
    if token.startswith("<0x"):
        return token[3:-1].lower()
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in printable)}
    return bytes(alphabet[c] for c in token).hex(" ") if set(token) <= alphabet.keys() else token
