"""An authority of the tests' own, made with openssl, and the certificates that it signs.

Both have what Python 3.13 asks for: the purpose of the one's key, and which key signed the other.
"""
import pathlib
import re
import subprocess
from typing import NamedTuple

KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


class Certificate(NamedTuple):
    file: str
    key: str


class Authority:
    """Keeps everything in `place`; `file` is the certificate that a client is to trust."""

    def __init__(self, place):
        self.place = pathlib.Path(place)
        self.file = str(self.place / "ca.pem")
        self._openssl("req", "-x509", *KEY, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=an authority",
                      "-addext", "keyUsage=critical,keyCertSign")  # fmt: skip

    def sign(self, subject, days=1):
        """A certificate for a subject like `IP:127.0.0.1` or `DNS:bus.example`. With 0 days it ends as it begins."""
        name = f"{days}-{re.sub('[^a-z0-9]', '-', subject.lower())}"
        (self.place / f"{name}.ext").write_text(f"subjectAltName={subject}\nauthorityKeyIdentifier=keyid\n")
        self._openssl("req", *KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", "/CN=bus")
        self._openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", f"{name}.ext",
                      "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", str(days))  # fmt: skip
        return Certificate(str(self.place / f"{name}.pem"), str(self.place / f"{name}.key"))

    def self_signed(self, subject):
        """A certificate that nobody else signed, as docs/deploy.md makes it."""
        name = f"self-{re.sub('[^a-z0-9]', '-', subject.lower())}"
        self._openssl("req", "-x509", *KEY, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", "/CN=bus",
                      "-addext", f"subjectAltName={subject}",
                      "-addext", "keyUsage=critical,digitalSignature,keyCertSign")  # fmt: skip
        return Certificate(str(self.place / f"{name}.pem"), str(self.place / f"{name}.key"))

    def _openssl(self, *arguments):
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=self.place, timeout=20)
