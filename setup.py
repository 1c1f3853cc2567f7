from setuptools import find_packages, setup

# Found, not listed, so that no room is forgotten; the card templates lie beside the package and are installed in it.
setup(
    packages=[*find_packages(include=["gisp_hf", "gisp_hf.*"]), "gisp_hf.model_cards"],
    package_dir={"gisp_hf.model_cards": "model_cards"},
)
