"""The web demo, ``agentsd app``: compare images in the browser; needs gradio."""
