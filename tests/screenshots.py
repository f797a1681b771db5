"""The playground's pictures for the documentation, from a running server:

python tests/screenshots.py http://127.0.0.1:8000 docs/images --tau 0.88
"""

import argparse
from pathlib import Path

from browser import open_page
from test_playground import DESKTOP, IDLE, PHONE, set_second_tau

QUESTION = "Write a Python function that tells whether a word is a palindrome."


def main() -> None:
    """Ask one question on a desktop and on a phone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tau", type=float, default=0.8, help="of the second answer (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="of an answer (default: %(default)s)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with open_page() as page:
        for name, size in {"desktop": DESKTOP, "phone": PHONE}.items():
            page.open(f"{args.url}/prunepath", **size)
            page.wait("document.querySelectorAll('input[type=range]').length === 2")
            page.evaluate(f"document.querySelector('#tokens').value = {args.tokens}")
            set_second_tau(page, args.tau)
            page.press("#question")
            page.type(QUESTION)
            page.press("#send")
            page.wait(f"document.querySelectorAll('.answer').length && {IDLE}", seconds=300)
            page.evaluate("document.activeElement.blur() || scrollTo(0, document.body.scrollHeight)")
            (args.folder / f"playground-{name}.png").write_bytes(page.screenshot())


if __name__ == "__main__":
    main()
