"""The melody world: procedural music of three traditions, played on the fly with captions that tell what is heard.

Equal-tempered major and minor, ten ragas, twelve makams. The base `melody` is trained on this world, and because every
pitch and beat is known, it doubles as a measuring instrument (`studio/evaluate/pitch.py` and its neighbours).
Everything is a function of a numpy generator, hence of a seed. Pitches are cents above the tonic.
"""
