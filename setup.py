"Everything that pip needs to know is read from settings.ini: name, version, requirements, extras, console scripts."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], inline_comment_prefixes=None)
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]


def lines(key: str) -> list:
    "The non-empty lines of a setting, one requirement or script each"
    return [line.strip() for line in settings.get(key, "").splitlines() if line.strip()]


extras = {name: lines(f"{name}_requirements") for name in settings["extras"].split()}
apart = {name: lines(f"{name}_requirements") for name in settings["extras_apart"].split()}
extras["all"] = sorted({requirement for extra in extras.values() for requirement in extra})
extras["dev"] = extras["all"] + lines("dev_requirements")

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="MIT",
    license_files=["LICENSE"],
    keywords=settings["keywords"].split(),
    packages=find_packages(include=["grocery_nb", "grocery_nb.*"]),
    include_package_data=True,
    package_data={"grocery_nb": ["assets/**"]},
    python_requires=">=" + settings["min_python"],
    install_requires=lines("requirements"),
    extras_require={**extras, **apart},
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{settings['lib_path']}={settings['lib_path']}._modidx:d"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Education",
        "Programming Language :: Python :: 3",
    ],
)
