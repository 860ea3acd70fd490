"""The embedded world: a small LLaVA that really sees, and benchmarks it can be asked.

`tower` fetches the vision tower, `world` draws pictures, `questions` asks about them, `build` writes the
benchmarks in their official layouts, `train` trains projector and language model. Nothing outside this
package and ``playground/tiny`` knows that the embedded model is special.
"""
