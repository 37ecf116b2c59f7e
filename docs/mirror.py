"""Files of the repository that are pages and pictures of the site under their own paths, so that links to them hold."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/ZOO.md", "tests/virtual_gpu/README.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    for path in (*PAGES, *(str(p.relative_to(root)) for p in root.glob("benchmarks/results/*/*.png"))):
        files.append(File.generated(config, path, abs_src_path=str(root / path)))
    return files
