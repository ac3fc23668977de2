"""The web demo, ``agentsd app``: for people who look at images; needs gradio."""
