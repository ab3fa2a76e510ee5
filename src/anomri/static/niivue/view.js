'use strict'
// The page of `anomri view`. Names that come from files are only ever set as textContent.

const byId = (id) => document.getElementById(id)
const { Niivue, SHOW_RENDER, SLICE_TYPE } = niivue
const LAYOUTS = {
  planes: [SLICE_TYPE.MULTIPLANAR, SHOW_RENDER.NEVER],
  planes3d: [SLICE_TYPE.MULTIPLANAR, SHOW_RENDER.ALWAYS],
  axial: [SLICE_TYPE.AXIAL, SHOW_RENDER.NEVER],
  coronal: [SLICE_TYPE.CORONAL, SHOW_RENDER.NEVER],
  sagittal: [SLICE_TYPE.SAGITTAL, SHOW_RENDER.NEVER],
  '3d': [SLICE_TYPE.RENDER, SHOW_RENDER.NEVER]
}
const MASKS = { outline: [0, 1], filled: [0.4, 1], off: [0, 0] } // opacity of the inside and of the rim
const MASK_COLOUR = { R: [0, 51], G: [0, 230], B: [0, 255], A: [0, 255], labels: ['', 'mask'] }
const ANOMALY = 1 // its place among NiiVue's volumes, after the background
// NiiVue's own shader lays overlays over the drawing, here the mask, and hides its rim. NiiVue finds only uniforms
// that are declared one by one.
const SLICE_SHADER = `#version 300 es
precision highp int;
precision highp float;
uniform highp sampler3D volume;
uniform highp sampler3D overlay;
uniform highp sampler3D drawing;
uniform float overlays;
uniform float opacity;
uniform float drawOpacity;
uniform float drawRimOpacity;
in vec3 texPos;
out vec4 color;
bool inMask(vec3 place) { return texture(drawing, place).r > 0.0; }
void main() {
  vec3 right = 1.5 * dFdx(texPos), up = 1.5 * dFdy(texPos); // rim of one to two pixels of the screen
  vec3 rgb = texture(volume, texPos).rgb;
  if (overlays > 0.0) {
    vec4 over = texture(overlay, texPos);
    rgb = mix(rgb, over.rgb, over.a);
  }
  if (inMask(texPos)) {
    bool within = inMask(texPos + right) && inMask(texPos - right) && inMask(texPos + up) && inMask(texPos - up);
    rgb = mix(rgb, vec3(0.2, 0.9, 1.0), within ? drawOpacity : drawRimOpacity);
  }
  color = vec4(rgb, opacity);
}`

const viewer = new Niivue({
  backColor: [0, 0, 0, 1],
  crosshairColor: [0.55, 0.75, 0.55, 0.8],
  crosshairWidth: 0.4,
  crosshairGap: 6, // what lies at the crosshair stays in sight
  fontColor: [0.75, 0.8, 0.85, 1],
  isRadiologicalConvention: true,
  sagittalNoseLeft: true,
  multiplanarShowRender: SHOW_RENDER.NEVER,
  showAllOrientationMarkers: true,
  dragAndDropEnabled: false,
  isColorbar: true,
  colorbarHeight: 0.035,
  logLevel: 'error',
  viewModeHotKey: '',
  clipPlaneHotKey: '',
  cycleClipPlaneHotKey: ''
})
let cases = []
let current = null // the case shown
let masked = false // whether its mask is loaded
let pending = Promise.resolve()
let wanted = 0 // number of the latest request to open something

function say(state, text) {
  document.body.dataset.state = state
  byId('status').textContent = text
}

function fixed(value, digits) {
  return value === null || value === undefined || !Number.isFinite(value) ? '-' : value.toFixed(digits)
}

function ml(cubicMillimetres) {
  return fixed(cubicMillimetres === null ? null : cubicMillimetres / 1000, 2)
}

function element(tag, text, parent) {
  const made = document.createElement(tag)
  made.textContent = text
  parent.append(made)
  return made
}

function listCases() {
  for (const item of cases) {
    const row = element('li', '', byId('cases'))
    item.button = element('button', item.name, row)
    item.button.type = 'button'
    const count = item.lesions === null ? 'no table of lesions' : `${item.lesions.length} found, ${ml(item.volume_mm3)} ml`
    element('small', count, item.button)
    item.button.addEventListener('click', () => request(item, 0))
  }
}

function filterCases() {
  const part = byId('filter').value.trim().toLowerCase()
  for (const item of cases) item.button.parentElement.hidden = !item.name.toLowerCase().includes(part)
}

// Volumes are opened one after the other; of several requests made meanwhile only the last is carried out.
function request(item, background, place = null) {
  const number = ++wanted
  say('loading', `Loading ${item.name} ...`)
  pending = pending.then(async () => {
    if (number !== wanted) return
    try {
      await open(item, background, place)
      const hint = item.backgrounds.some(({ url }) => url.includes('/scan-')) ? '' : ' (the scan was not found; name it with --scans)'
      if (number === wanted) say('ready', item.name + hint)
    } catch (error) {
      if (number === wanted) say('failed', `${item.name}: cannot be shown (${error.message ?? error})`)
    }
  })
}

async function open(item, background, place) {
  const { url, frame } = item.backgrounds[background]
  if (item !== current) listDetails(item)
  current = item
  viewer.closeDrawing()
  await viewer.loadVolumes([
    { url, colormap: 'gray', frame4D: frame, colorbarVisible: false },
    { url: item.anomaly, colormap: 'inferno', opacity: Number(byId('opacity').value) }
  ])
  if (viewer.volumes.length !== 2) throw new Error('a file is damaged or missing')
  masked = item.mask !== null && (await viewer.loadDrawingFromUrl(item.mask))
  const note = item.mask !== null && !masked ? 'The mask lies on another grid than the background and is not shown.' : ''
  byId('lesion-note').textContent = note || byId('lesion-note').textContent
  setRange(item, place === null)
  showMask()
  const first = (item.lesions ?? []).findIndex((lesion) => lesion.centroid_mm)
  if (place !== null) jump(place)
  else if (first >= 0) chooseLesion(first)
  else jump(peakOf(viewer.volumes[ANOMALY]))
}

function listDetails(item) {
  for (const other of cases) other.button.setAttribute('aria-current', String(other === item))
  const choice = byId('background')
  choice.replaceChildren()
  item.backgrounds.forEach(({ label }, index) => (element('option', label, choice).value = index))
  const body = byId('lesions').tBodies[0]
  body.replaceChildren()
  const lesions = item.lesions ?? []
  lesions.forEach((lesion, index) => {
    const [number, ...cells] = lesion.cells
    const row = element('tr', '', body)
    const button = element('button', number, element('td', '', row))
    button.type = 'button'
    button.title = 'Move the crosshair there'
    for (const cell of cells) element('td', cell, row)
    row.addEventListener('click', () => chooseLesion(index))
  })
  byId('lesions').hidden = lesions.length === 0
  const none = item.lesions === null ? 'There is no table for this case.' : 'None was found.'
  byId('lesion-note').textContent = lesions.length ? 'Choose one to move the crosshair there.' : none
}

function chooseLesion(index) {
  ;[...byId('lesions').tBodies[0].rows].forEach((row, k) => row.setAttribute('aria-selected', String(k === index)))
  const { centroid_mm: centroid } = current.lesions[index]
  if (centroid) jump(centroid)
}

function jump(mm) {
  if (viewer.volumes.length === 0) return
  // True: the scanner's mm, also where the scan is oblique to them.
  viewer.scene.crosshairPos = viewer.mm2frac(mm, 0, true)
  viewer.createOnLocationChange()
  viewer.drawScene()
}

function peakOf(volume) {
  const { img, hdr } = volume
  const { dims } = hdr
  let best = 0
  for (let k = 1; k < dims[1] * dims[2] * dims[3]; k++) if (img[k] > img[best]) best = k
  const [i, j, k] = [best % dims[1], Math.floor(best / dims[1]) % dims[2], Math.floor(best / dims[1] / dims[2])]
  return hdr.affine.slice(0, 3).map((row) => row[0] * i + row[1] * j + row[2] * k + row[3])
}

// The colours end at the scan's own highest score.
function setRange(item, anew) {
  const volume = viewer.volumes[ANOMALY]
  const slider = byId('threshold')
  const top = Math.max(volume.global_max, item.threshold ?? 0) || 1
  item.display ??= [volume.cal_min, top]
  slider.max = top
  slider.step = top / 500
  if (anew) resetThreshold()
  else showThreshold()
}

function resetThreshold() {
  if (!current?.display) return
  const [low, high] = current.display
  byId('threshold').value = current.threshold ?? (low > 0 ? low : 0.1 * high)
  // A slider rounds to its step; the model's own threshold is kept as it is.
  showThreshold(current.threshold ?? Number(byId('threshold').value))
}

function showThreshold(level = Number(byId('threshold').value)) {
  byId('threshold-value').textContent = level.toPrecision(3)
  const volume = viewer.volumes[ANOMALY]
  if (!volume) return
  volume.cal_min = level
  volume.cal_max = Math.max(current.display[1], level * 1.05, 1e-6)
  redraw()
}

let redrawing = false
function redraw() {
  if (redrawing) return
  redrawing = true
  requestAnimationFrame(() => {
    redrawing = false
    viewer.updateGLVolume()
  })
}

function showOpacity() {
  const opacity = Number(byId('opacity').value)
  byId('opacity-value').textContent = `${Math.round(100 * opacity)} %`
  if (!viewer.volumes[ANOMALY]) return
  viewer.volumes[ANOMALY].opacity = opacity
  redraw()
}

function showMask() {
  const [fill, rim] = MASKS[byId('mask').value]
  viewer.drawRimOpacity = rim
  viewer.setDrawOpacity(fill)
}

function showLayout() {
  const [type, render] = LAYOUTS[byId('layout').value]
  viewer.opts.multiplanarShowRender = render
  viewer.setSliceType(type)
}

function showPlace({ mm, values }) {
  if (!current || values.length < 2) return
  byId('place').textContent = [...mm].slice(0, 3).map((value) => value.toFixed(1).replace('-', '\u2212')).join(', ') + ' mm'
  byId('background-name').textContent = current.backgrounds[Number(byId('background').value)].label
  byId('background-at').textContent = String(Number(values[0].value.toPrecision(4)))
  byId('anomaly-at').textContent = fixed(values[ANOMALY].value, 4)
  const [x, y, z] = viewer.frac2vox(viewer.scene.crosshairPos)
  const [, nx, ny] = viewer.volumes[0].dimsRAS
  const inside = masked && viewer.drawBitmap?.[x + nx * (y + ny * z)]
  byId('mask-at').textContent = masked ? (inside ? 'inside' : 'outside') : '-'
}

// NiiVue's own keys would change the view behind the controls; the picture takes only these.
function onKey(event) {
  if (event.key === 'Tab') return
  event.stopPropagation()
  const right = viewer.opts.isRadiologicalConvention ? -1 : 1
  const steps = {
    ArrowRight: [right, 0, 0], ArrowLeft: [-right, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0],
    PageUp: [0, 0, 1], PageDown: [0, 0, -1]
  }
  const step = steps[event.key]
  if (!step || event.type !== 'keydown' || viewer.volumes.length === 0 || event.ctrlKey || event.metaKey) return
  event.preventDefault()
  viewer.moveCrosshairInVox(...step)
}

function connect() {
  byId('filter').addEventListener('input', filterCases)
  byId('threshold').addEventListener('input', () => showThreshold())
  byId('reset').addEventListener('click', resetThreshold)
  byId('opacity').addEventListener('input', showOpacity)
  byId('mask').addEventListener('change', showMask)
  byId('layout').addEventListener('change', showLayout)
  byId('radiological').addEventListener('change', (event) => viewer.setRadiologicalConvention(event.target.checked))
  byId('controls').addEventListener('submit', (event) => event.preventDefault())
  byId('background').addEventListener('change', (event) => {
    const here = [...viewer.frac2mm(viewer.scene.crosshairPos, 0, true)].slice(0, 3)
    request(current, Number(event.target.value), here)
  })
  for (const type of ['keydown', 'keyup']) byId('stage').addEventListener(type, onKey, true)
}

async function start() {
  try {
    await viewer.attachToCanvas(byId('canvas'))
    viewer.setDrawColormap(MASK_COLOUR)
    viewer.setCustomSliceShader(SLICE_SHADER)
    viewer.onLocationChange = showPlace
    const listing = await (await fetch('/cases.json')).json()
    cases = listing.cases
    for (const { heading, description } of listing.columns) {
      element('th', heading, byId('lesions').tHead.rows[0]).title = description
    }
  } catch (error) {
    say('failed', `The pictures cannot be shown: ${error.message ?? error}`)
    return
  }
  connect()
  listCases()
  showOpacity()
  request(cases[0], 0)
}

start()
