"""The sweep's figures as parts of the page: PNG files with the title and description that they carry."""

import base64
import logging
from html import escape
from pathlib import Path

from PIL import Image, UnidentifiedImageError

logger = logging.getLogger(__name__)

FOLDER = "figures"


def figures_html(sweep_dir: str) -> str:
    """All PNG files in the sweep's folder of figures; empty where there are none."""
    return "".join(_figure(path) for path in sorted(Path(sweep_dir, FOLDER).glob("*.png")))


def _figure(path: Path) -> str:
    try:
        with Image.open(path) as image:
            text, (width, height) = dict(getattr(image, "text", {})), image.size
    except (UnidentifiedImageError, OSError) as error:
        logger.warning("%s is left out: %s", path, error)
        return f'<p class="note">{escape(path.name)} is left out: it is no whole PNG file.</p>'
    title = text.get("Title") or path.stem.replace("_", " ")
    description = text.get("Description") or "The file carries no description."
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'alt="{escape(description)}"><figcaption><strong>{escape(title)}.</strong> '
        f'<span class="file">{FOLDER}/{escape(path.name)}</span>'
        f"<details><summary>In words</summary>{escape(description)}</details></figcaption></figure>"
    )
