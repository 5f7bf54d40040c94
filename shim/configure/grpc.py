"""One unary call of gRPC over HTTP/2: bytes in, bytes out, no socket.

Enough for a few small messages to a CRI socket, for which a node has no library: one stream, header compression only
where the other side insists on it (it is told to keep no table).  Sources: RFC 9113, RFC 7541, gRPC over HTTP/2.
"""

from __future__ import annotations

from typing import Dict, Iterator, List, Tuple, Union

MAX_ANSWER = 4 << 20
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
_END_STREAM = _ACK = 0x1
_END_HEADERS, _PADDED, _PRIORITY = 0x4, 0x8, 0x20
_STREAM = 1

Field = Tuple[int, Union[int, str, bytes, List["Field"]]]


class Broken(Exception):
    """The other side does not speak as it should, or has ended the call."""


def request(method: str, message: bytes) -> bytes:
    """All that a client sends for one call of `/service/method`."""
    settings = b"".join(number.to_bytes(2, "big") + value.to_bytes(4, "big")
                        for number, value in ((1, 0), (2, 0), (4, MAX_ANSWER)))  # no table, no push, room for the answer
    headers = b"".join(_literal(name, value) for name, value in (
        (":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "localhost"),
        ("content-type", "application/grpc"), ("te", "trailers")))
    data = b"\0" + len(message).to_bytes(4, "big") + message
    return b"".join((_PREFACE, _frame(_SETTINGS, 0, 0, settings), _frame(_WINDOW_UPDATE, 0, 0, MAX_ANSWER.to_bytes(4, "big")),
                     _frame(_HEADERS, _END_HEADERS, _STREAM, headers), _frame(_DATA, _END_STREAM, _STREAM, data)))


class Answer:
    """What comes back: `feed` takes bytes and gives what is to be sent in turn; `done` says that all is there."""

    def __init__(self) -> None:
        self.done = False
        self.status = -1
        self.words = ""
        self._bytes = b""
        self._data = b""
        self._block = b""
        self._last = False

    def feed(self, data: bytes) -> bytes:
        """Raises Broken."""
        self._bytes += data
        reply = b""
        while len(self._bytes) >= 9 and not self.done:
            length = int.from_bytes(self._bytes[:3], "big")
            if length > MAX_ANSWER or len(self._data) + length > MAX_ANSWER:
                raise Broken("an answer of more than 4 MiB")
            if len(self._bytes) < 9 + length:
                break
            kind, flags = self._bytes[3], self._bytes[4]
            stream = int.from_bytes(self._bytes[5:9], "big") & 0x7FFFFFFF
            body, self._bytes = self._bytes[9:9 + length], self._bytes[9 + length:]
            reply += self._frame(kind, flags, stream, body)
        return reply

    def message(self) -> bytes:
        """The answer's message.  Raises Broken when it is not whole."""
        if len(self._data) < 5 or self._data[0] or int.from_bytes(self._data[1:5], "big") != len(self._data) - 5:
            raise Broken("an answer without a whole message")
        return self._data[5:]

    def _frame(self, kind: int, flags: int, stream: int, body: bytes) -> bytes:
        if kind == _GOAWAY:
            raise Broken(f"the connection was ended: {body[8:].decode('utf-8', 'replace')}")
        if stream == 0:
            answered = kind in (_SETTINGS, _PING) and not flags & _ACK
            return _frame(kind, _ACK, 0, body if kind == _PING else b"") if answered else b""
        if stream != _STREAM:
            return b""
        if kind == _RST_STREAM:
            raise Broken("the call was ended")
        if kind in (_DATA, _HEADERS, _CONTINUATION):
            if kind != _CONTINUATION and flags & _PADDED:
                body = body[1:len(body) - body[0]] if body else body
            if kind == _HEADERS and flags & _PRIORITY:
                body = body[5:]
            if kind == _DATA:
                self._data += body
            else:
                self._block += body
            if kind != _CONTINUATION:
                self._last = bool(flags & _END_STREAM)
            if kind != _DATA and flags & _END_HEADERS:
                self._headers()
            self.done = self._last and (kind == _DATA or bool(flags & _END_HEADERS))
        return b""

    def _headers(self) -> None:
        found = dict(unpack(self._block))
        self._block = b""
        status = found.get("grpc-status", "")
        if status:
            if not status.isdigit() or not status.isascii():
                raise Broken(f"a status {status!r}")
            self.status = int(status)
            self.words = _percent(found.get("grpc-message", ""))


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + body


def _percent(text: str) -> str:
    """A message as gRPC writes it into a header: bytes of UTF-8, some of them as %XX."""
    from urllib.parse import unquote
    return unquote(text, errors="replace")


# --- header compression (RFC 7541) ------------------------------------------------------------------------------

# Bits of each symbol's code, as letters from A = 5 bits; symbol 256 ends a string.  The code is canonical.
_LENGTHS = ("ISXXXXXXXTZXXZXXXXXXXXZXXXXXXXXXBFFHIBDGFFDGDBBBAAABBBBBBBCDKBHFIBCCCCCCCCCCCCCCCCCCCCCCDCDIOIJBKABABABBBACCBBBABCBAABCC"
            "CCCKGJIXPRPPRRRSRSSSSSTSTTRSTSSSSQRSRSSTRQPRRSSQSRRTQRSSQQRQSRSSPRRRSRRSVVPORSRUVVVWWVTUOQVWWVWTQQVVXWWWPTPQRQQSRRUUTTVSVWVVWWWWWXWWWWWVZ")


def _codes() -> Dict[Tuple[int, int], int]:
    """(bits, code) of every symbol."""
    codes = {}
    code = bits = 0
    for symbol in sorted(range(len(_LENGTHS)), key=lambda symbol: (_LENGTHS[symbol], symbol)):
        length = ord(_LENGTHS[symbol]) - ord("A") + 5
        code <<= length - bits
        bits = length
        codes[bits, code] = symbol
        code += 1
    return codes


def huffman(data: bytes) -> bytes:
    """A string decoded.  Raises Broken."""
    codes = _codes()
    result = bytearray()
    code = bits = 0
    for byte in data:
        for shift in range(7, -1, -1):
            code, bits = code << 1 | byte >> shift & 1, bits + 1
            if (bits, code) in codes:
                symbol = codes[bits, code]
                if symbol == 256:
                    raise Broken("a string that ends within")
                result.append(symbol)
                code = bits = 0
    if bits > 7 or code != (1 << bits) - 1:
        raise Broken("a string that ends in the middle of a letter")
    return bytes(result)


def unpack(block: bytes) -> Iterator[Tuple[str, str]]:
    """The fields of a header block; those that stand in RFC 7541's own table are passed over.  Raises Broken."""
    at = 0
    try:
        while at < len(block):
            first = block[at]
            if first & 0x80:  # indexed
                _, at = _integer(block, at, 7)
            elif first & 0xE0 == 0x20:  # the table's size
                _, at = _integer(block, at, 5)
            else:
                index, at = _integer(block, at, 6 if first & 0x40 else 4)
                name = ""
                if not index:
                    name, at = _string(block, at)
                value, at = _string(block, at)
                yield name, value
    except IndexError:
        raise Broken("headers that end within") from None


def _integer(data: bytes, at: int, bits: int) -> Tuple[int, int]:
    most = (1 << bits) - 1
    value, at = data[at] & most, at + 1
    if value < most:
        return value, at
    for shift in range(0, 35, 7):
        value += (data[at] & 0x7F) << shift
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
    raise Broken("a number that does not end")


def _string(data: bytes, at: int) -> Tuple[str, int]:
    coded = data[at] & 0x80
    length, at = _integer(data, at, 7)
    if at + length > len(data):
        raise Broken("a string that ends within")
    text = data[at:at + length]
    return (huffman(text) if coded else text).decode("latin-1"), at + length


def _literal(name: str, value: str) -> bytes:
    """A field that no table keeps."""
    return b"\x00" + b"".join(_length(len(text)) + text for text in (name.encode(), value.encode()))


def _length(value: int) -> bytes:
    if value < 0x7F:
        return bytes((value,))
    value -= 0x7F
    parts = [0x7F]
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*parts, value))


# --- protobuf ---------------------------------------------------------------------------------------------------

def encode(fields: List[Field]) -> bytes:
    """A message from numbered fields: a number, text, bytes, or the fields of a message within."""
    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(_varint(number << 3) + _varint(int(value)))
        else:
            body = value.encode() if isinstance(value, str) else value if isinstance(value, bytes) else encode(value)
            parts.append(_varint(number << 3 | 2) + _varint(len(body)) + body)
    return b"".join(parts)


def decode(data: bytes) -> Dict[int, List[Union[int, bytes]]]:
    """The values of a message by the field's number, in order.  Raises Broken."""
    found: Dict[int, List[Union[int, bytes]]] = {}
    at = 0
    try:
        while at < len(data):
            tag, at = _read_varint(data, at)
            kind = tag & 7
            value: Union[int, bytes]
            if kind == 0:
                value, at = _read_varint(data, at)
            else:
                length = {1: 8, 5: 4}.get(kind, -1)
                if kind == 2:
                    length, at = _read_varint(data, at)
                if length < 0 or at + length > len(data):
                    raise Broken("a message that ends within")
                value, at = data[at:at + length], at + length
            found.setdefault(tag >> 3, []).append(value)
    except IndexError:
        raise Broken("a message that ends within") from None
    return found


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*parts, value))


def _read_varint(data: bytes, at: int) -> Tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 0x7F) << shift
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
    raise Broken("a number that does not end")
