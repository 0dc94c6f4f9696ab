// Hands pictures that the server has sent to the list of samples.
watch("value", () => document.dispatchEvent(new CustomEvent("stethoscope-thumbnails", { detail: JSON.parse(props.value) })));
