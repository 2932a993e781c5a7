"""XMP packets with the digital source type of generated media (IPTC) and, outside PNG, the full settings.

    <Iptc4xmpExt:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia</…>
    <tim:settings>{"format": 1, "prompt": "a red fox", …}</tim:settings>

A segment of JPEG holds 64 kB. Longer settings go into an extended packet, as the XMP specification, part 3, 1.1.3.1, describes it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from xml.etree import ElementTree
from xml.sax.saxutils import escape

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
NAMESPACE = "urn:tim:xmp/1.0/"
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_NOTE = "http://ns.adobe.com/xmp/note/"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_EXTENDED = b"http://ns.adobe.com/xmp/extension/\0"
_MAX_PACKET = 60_000  # bytes of a packet in one segment of JPEG
_PORTION = 65_000  # bytes of an extended packet in one segment
_HEADER = struct.Struct(">32sII")  # of a portion: digest of the whole, its length, offset of this portion


def packet(*, source: str, tool: str, settings: str | None) -> bytes:
    """An XMP packet. source: GENERATED or COMPOSITE; tool: name and version of this program; settings: their JSON."""
    return _packet(_properties(source=source, tool=tool) + _settings(settings))


def packets_of_jpeg(*, source: str, tool: str, settings: str) -> tuple[bytes, bytes]:
    """(XMP packet of at most 64 kB, further segments of JPEG with an extended packet; empty if the settings fit into the first)"""
    whole = packet(source=source, tool=tool, settings=settings)
    if len(whole) <= _MAX_PACKET:
        return whole, b""
    extended = _rdf(_settings(settings))
    digest = hashlib.md5(extended, usedforsecurity=False).hexdigest().upper()
    note = f"<xmpNote:HasExtendedXMP>{digest}</xmpNote:HasExtendedXMP>"
    segments = []
    for offset in range(0, len(extended), _PORTION):
        body = _EXTENDED + _HEADER.pack(digest.encode(), len(extended), offset) + extended[offset : offset + _PORTION]
        segments.append(b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body)
    return _packet(_properties(source=source, tool=tool) + note), b"".join(segments)


def settings_in(xmp: bytes, *, segments: Sequence[bytes] = ()) -> str | None:
    """The settings' JSON in an XMP packet, or in the extended one of a JPEG's APP1 segments; None if there are none."""
    for document in (xmp, _extended(segments)):
        for element in _elements(document):
            value = element.text if element.tag == f"{{{NAMESPACE}}}settings" else element.get(f"{{{NAMESPACE}}}settings")
            if value:
                return value
    return None


def lacks_settings(xmp: bytes) -> bool:
    """Whether an XMP packet is one of ours that names an extended packet. If `settings_in` found none, that one is damaged or gone."""
    return b"<xmp:CreatorTool>tim" in xmp and b"<xmpNote:HasExtendedXMP>" in xmp


def _properties(*, source: str, tool: str) -> str:
    return (
        f"<Iptc4xmpExt:DigitalSourceType>{escape(source)}</Iptc4xmpExt:DigitalSourceType><xmp:CreatorTool>{escape(tool)}</xmp:CreatorTool>"
    )


def _settings(settings: str | None) -> str:
    return "" if settings is None else f"<tim:settings>{escape(settings)}</tim:settings>"


def _rdf(properties: str) -> bytes:
    namespaces = f'xmlns:Iptc4xmpExt="{_IPTC}" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:xmpNote="{_NOTE}" xmlns:tim="{NAMESPACE}"'
    description = f'<rdf:Description rdf:about="" {namespaces}>{properties}</rdf:Description>'
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{_RDF}">{description}</rdf:RDF></x:xmpmeta>'.encode()


def _packet(properties: str) -> bytes:
    start = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'.encode()
    return start + _rdf(properties) + b'\n<?xpacket end="w"?>'


def _elements(document: bytes) -> list[ElementTree.Element]:
    """All elements; none of a document that is damaged or declares entities."""
    document = document.strip(b"\0 \r\n\t")
    if not document or b"<!" in document or b"\0" in document:
        return []
    try:
        return list(ElementTree.fromstring(document).iter())
    except (ElementTree.ParseError, ValueError, LookupError):
        return []


def _extended(segments: Sequence[bytes]) -> bytes:
    """The extended packet, put together from its portions; empty if there is none, or a part is missing."""
    start = len(_EXTENDED) + _HEADER.size
    portions = {}
    for segment in segments:
        if segment.startswith(_EXTENDED) and len(segment) > start:
            digest, length, offset = _HEADER.unpack(segment[len(_EXTENDED) : start])
            portions[offset] = (digest, length, segment[start:])
    joined = b"".join(portions[offset][2] for offset in sorted(portions))
    is_whole = all(digest == hashlib.md5(joined, usedforsecurity=False).hexdigest().upper().encode() for digest, _, _ in portions.values())
    return joined if is_whole else b""
